"""Writing records: one idempotent producer, one poll thread, asyncio or plain callers.

Acknowledgements arrive on the poll thread and resolve a future per record. The local queue is
bounded (`dataplane.kafka`): when it is full, `produce` waits and `send` blocks.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dataplane.kafka import checked, log, producer_config
from idl.codec import CONTENT_TYPE_HEADER
from idl.errors import ConfigError, InvalidRecordError, OutriderError, PlatformFaultError
from idl.jobs import SourceRef
from idl.limits import KAFKA_RECORD_BYTES_MAX
from idl.settings import KafkaSettings

DELIVERY_TIMEOUT_MS: Final = 60_000
"""Results and submissions: outlasts a broker's restart; after it the caller is told."""
POLL_S: Final = 0.1
"""The poll thread sleeps in librdkafka and wakes for every acknowledgement; this bounds `close`."""
FULL_RETRY_S: Final = 0.002
"""How long to wait for room in a full local queue before looking again."""
METADATA_TIMEOUT_S: Final = 5.0
WARM_UP_S: Final = 1.0
"""Metadata asked for at once gets an idempotent producer its id 0.5 s sooner (measured)."""
ANY_PARTITION: Final = -1
"""librdkafka's PARTITION_UA: the key decides."""

_TOO_LARGE: Final = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE)
_IN_DOUBT: Final = "it may still have been written, so send the very same record again"


class RecordProducer:
    """Thread-safe. Everything else of the data plane that writes is built on one of these.

    A topic must exist before the first record (`ensure_topics`): brokers that create topics on
    demand would create them with other settings.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        name: str = "producer",
        delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
        linger_ms: float = 1.0,
    ) -> None:
        """Connects in the background. Raises ConfigError where settings are refused."""
        config = producer_config(
            settings, name, delivery_timeout_ms=delivery_timeout_ms, linger_ms=linger_ms
        )
        self._settings = settings
        try:
            self._producer = Producer(config)
        except (KafkaException, ValueError, TypeError) as error:
            raise checked(error, "Kafka settings", settings) from error
        self._topics: frozenset[str] = frozenset()
        self._closing = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._poll, name=f"kafka-{name}", daemon=True)
        self._thread.start()

    async def produce(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | str | None = None,
        content_type: str = "",
        partition: int | None = None,
    ) -> SourceRef:
        """Writes one record; returns its place once it is acknowledged by all in-sync replicas.

        Waits while the local queue is full. Raises PlatformFaultError(retryable=True) when it is
        not delivered in time (it may still have been written), InvalidRecordError when it is too
        large, ConfigError when the topic does not exist, BrokerUnavailableError.
        """
        sent = await self.enqueue(
            topic, value, key=key, content_type=content_type, partition=partition
        )
        return await sent

    async def enqueue(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | str | None = None,
        content_type: str = "",
        partition: int | None = None,
    ) -> "asyncio.Future[SourceRef]":
        """`produce` in two steps: waits for room in the local queue; the future is the place.

        For pipelining: records enqueued one after the other reach a partition in that order.
        """
        if topic not in self._topics:
            await asyncio.to_thread(self.require_topic, topic)
        while True:
            future = self.try_send(
                topic, value, key=key, content_type=content_type, partition=partition
            )
            if future is not None:
                return asyncio.wrap_future(future)
            await asyncio.sleep(FULL_RETRY_S)

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | str | None = None,
        content_type: str = "",
        partition: int | None = None,
    ) -> "Future[SourceRef]":
        """`produce` for callers without a loop; blocks only while the local queue is full (and
        once per topic, to see that it exists)."""
        if topic not in self._topics:
            self.require_topic(topic)
        while True:
            future = self.try_send(
                topic, value, key=key, content_type=content_type, partition=partition
            )
            if future is not None:
                return future
            time.sleep(FULL_RETRY_S)

    def try_send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | str | None = None,
        content_type: str = "",
        partition: int | None = None,
    ) -> "Future[SourceRef] | None":
        """Never blocks: None where the local queue is full. Does not check that topic exists."""
        if self._closed:
            raise PlatformFaultError("this producer is closed; open another one")
        future: Future[SourceRef] = Future()
        future.set_running_or_notify_cancel()  # once sent, nobody can take it back
        headers: dict[str, str | bytes | None] | None = None
        if content_type:
            headers = {CONTENT_TYPE_HEADER: content_type}
        try:
            self._producer.produce(
                topic,
                value,
                key,
                ANY_PARTITION if partition is None else partition,
                on_delivery=self._settle(future),
                headers=headers,
            )
        except BufferError:
            return None
        except KafkaException as error:
            raise self._fault(error.args[0], topic, len(value)) from error
        return future

    def require_topic(self, topic: str, timeout_s: float = METADATA_TIMEOUT_S) -> None:
        """Raises ConfigError where `topic` does not exist; BrokerUnavailableError. Blocks."""
        if topic in self._topics:
            return
        try:
            found = self._producer.list_topics(timeout=timeout_s).topics
        except KafkaException as error:
            raise checked(error, "listing topics", self._settings) from error
        self._topics = frozenset(found)
        if topic not in self._topics:
            raise ConfigError(
                f"topic {topic} does not exist at {self._settings.bootstrap}; "
                "add its queue to the cluster file and run `outrider topics`, or check the name"
            )

    @property
    def undelivered(self) -> int:
        """Records sent and not yet acknowledged or failed."""
        return 0 if self._closed else len(self._producer)

    def flush(self, timeout_s: float = 10.0) -> int:
        """Waits for what was sent; returns how many records are still undelivered."""
        return 0 if self._closed else self._producer.flush(timeout_s)

    def abandon(self) -> None:
        """Fails what is unacknowledged and ends, without waiting. Safe from any callback."""
        self._closed = True
        with contextlib.suppress(KafkaException):
            self._producer.purge(in_queue=True, in_flight=True, blocking=False)
        self._closing.set()

    def close(self, timeout_s: float = 10.0) -> None:
        """Flushes, fails what remains, ends the thread. Idempotent."""
        if not self._closed and self._producer.flush(timeout_s) > 0:
            log.warning("%d records were not delivered before closing", len(self._producer))
        self.abandon()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    async def aclose(self, timeout_s: float = 10.0) -> None:
        """`close` without blocking the loop."""
        await asyncio.to_thread(self.close, timeout_s)

    def _poll(self) -> None:
        with contextlib.suppress(KafkaException):  # nobody answers yet: the first record waits
            self._topics = frozenset(self._producer.list_topics(timeout=WARM_UP_S).topics)
        while not self._closing.is_set():
            self._producer.poll(POLL_S)
        self._producer.flush(POLL_S)  # delivers the failures of what `abandon` purged

    def _settle(
        self, future: "Future[SourceRef]"
    ) -> "Callable[[KafkaError | None, Message], None]":
        def settle(error: KafkaError | None, message: Message) -> None:
            topic = message.topic() or ""
            if error is not None:
                future.set_exception(self._fault(error, topic, len(message.value() or b"")))
                return
            partition, offset = message.partition(), message.offset()
            if partition is None or offset is None or offset < 0:
                future.set_exception(self._nowhere(topic))
                return
            future.set_result(SourceRef(topic=topic, partition=partition, offset=offset))

        return settle

    def _nowhere(self, topic: str) -> PlatformFaultError:
        """librdkafka acknowledges without an offset what it only infers to be written: from a
        later record's success, which is wrong where that was the broker's first (see
        `kafka.PRODUCE_IN_FLIGHT_MAX`), or from a broker that knows the record already."""
        return PlatformFaultError(
            f"Kafka at {self._settings.bootstrap} did not say where it wrote a record for {topic} "
            f"(acks=0, or more than one request in flight); {_IN_DOUBT}",
            retryable=True,
        )

    def _fault(self, error: KafkaError, topic: str, size_bytes: int) -> OutriderError:
        if error.code() in _TOO_LARGE:
            return InvalidRecordError(
                "too-large",
                f"a record of {size_bytes} bytes does not fit into topic {topic} "
                f"(at most {KAFKA_RECORD_BYTES_MAX}); send less",
            )
        if error.code() in (KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT):
            return PlatformFaultError(
                f"Kafka at {self._settings.bootstrap} did not acknowledge a record for {topic} "
                f"in time; {_IN_DOUBT}",
                retryable=True,
            )
        if error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            return PlatformFaultError(
                f"a record for {topic} was given up because its producer closed; {_IN_DOUBT}",
                retryable=True,
            )
        if error.fatal():
            return PlatformFaultError(
                f"the Kafka producer cannot go on ({error.str()}); open another one",
                retryable=True,
            )
        return checked(KafkaException(error), f"writing to {topic}", self._settings)
