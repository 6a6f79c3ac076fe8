"""Payloads by claim check: put one into `payloads`, fetch one by its place.

A fetch is one assignment at one offset. What Kafka sends along with the record (its neighbours)
is kept in a small cache, because jobs submitted together are usually fetched together.
"""

import asyncio
import queue
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from typing import Final

from confluent_kafka import Consumer, KafkaError, TopicPartition

from dataplane.core.claimcheck import (
    PayloadCorruptError,
    PayloadMissingError,
    needs_claim_check,
    reference,
    verify,
)
from dataplane.kafka import unavailable
from dataplane.producer import RecordProducer
from dataplane.read import GONE_CODES, open_consumer, partition_watermarks, reading_fault
from dataplane.records import KafkaRecord, record_of
from idl.codec import decode_spec
from idl.errors import BrokerUnavailableError, InvalidRecordError, PlatformFaultError
from idl.jobs import PayloadLocation, PayloadRef, SourceRef
from idl.settings import KafkaSettings
from idl.units import KIB, MIB

FETCHERS: Final = 4
"""Fetches under way at once, each on a connection of its own; more callers wait in line."""
FETCH_TIMEOUT_S: Final = 30.0
"""Outlasts a broker's failover (2–9 s); then the attempt is a platform fault, to be retried."""
CACHE_BYTES_MAX: Final = 32 * MIB
"""Neighbours kept: a few of the largest payloads, or hundreds of usual ones."""
CACHE_RECORD_BYTES_MAX: Final = 1 * MIB
"""Larger neighbours would push everything else out."""
FETCH_BYTES: Final = 256 * KIB
"""Asked for per fetch; one larger record still comes whole (KIP-74)."""
PREFETCH_RECORDS_MIN: Final = 1
"""librdkafka reads on only once its queue is empty: we want one answer, not the whole topic."""
NEIGHBOURS_MAX: Final = 500
POLL_S: Final = 0.2
LOOK_AGAIN_S: Final = 0.5
"""Nothing came for this long: ask whether the record exists at all (Tansu never says so)."""


async def put_payload(producer: RecordProducer, topic: str, key: str, data: bytes) -> PayloadRef:
    """Stores `data` as one record of `topic` (`TopicNames.payloads`); `key` is the job's id.

    Raises InvalidRecordError (too large), PlatformFaultError.
    """
    needs_claim_check(len(data))
    place = await producer.produce(topic, data, key=key)
    return reference(data, place.partition, place.offset)


class PayloadFetcher:
    """Fetches payloads by partition and offset; many callers at once. Safe from any thread."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        cache_bytes_max: int = CACHE_BYTES_MAX,
        fetchers: int = FETCHERS,
    ) -> None:
        """Starts no thread and opens no connection before the first fetch."""
        self._settings = settings
        self._cache = _RecordCache(cache_bytes_max)
        self._count = fetchers
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    async def fetch(self, location: PayloadLocation, timeout_s: float = FETCH_TIMEOUT_S) -> bytes:
        """The payload, checked against size and SHA-256.

        Raises PayloadMissingError and PayloadCorruptError (JobFaultError: from
        `dataplane.core.claimcheck`), BrokerUnavailableError (retryable).
        """
        record = await asyncio.wrap_future(self._ask(location.source, timeout_s))
        if location.size_bytes > MIB:  # hashing megabytes would hold up the loop
            return await asyncio.to_thread(_payload_of, record, location)
        return _payload_of(record, location)

    def fetch_sync(self, location: PayloadLocation, timeout_s: float = FETCH_TIMEOUT_S) -> bytes:
        """`fetch` for tools without a loop."""
        return _payload_of(self._ask(location.source, timeout_s).result(), location)

    def close(self) -> None:
        """Ends the fetch threads; fetches under way fail as unavailable. Idempotent."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._requests.put(None)
        for thread in threads:
            thread.join(2.0)

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
        await asyncio.to_thread(self.close)

    def _ask(self, source: SourceRef, timeout_s: float) -> "Future[KafkaRecord]":
        found: Future[KafkaRecord] = Future()
        found.set_running_or_notify_cancel()
        cached = self._cache.get(source)
        if cached is not None:
            found.set_result(cached)
            return found
        with self._lock:
            if self._closed:
                raise PlatformFaultError("this payload fetcher is closed; open another one")
            if len(self._threads) < self._count:
                thread = threading.Thread(target=self._work, name="kafka-payloads", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._requests.put(_Request(source, time.monotonic() + timeout_s, found))
        return found

    def _work(self) -> None:
        consumer: Consumer | None = None
        while (request := self._requests.get()) is not None:
            try:
                if consumer is None:
                    consumer = self._open()
                request.found.set_result(self._fetch(consumer, request))
            except Exception as error:  # noqa: BLE001 - handed to the caller, whatever it is
                request.found.set_exception(error)
        if consumer is not None:
            consumer.close()

    def _open(self) -> Consumer:
        return open_consumer(
            self._settings,
            "payloads",
            **{
                "enable.partition.eof": True,
                "max.partition.fetch.bytes": FETCH_BYTES,
                "queued.min.messages": PREFETCH_RECORDS_MIN,
            },
        )

    def _fetch(self, consumer: Consumer, request: "_Request") -> KafkaRecord:
        source = request.source
        cached = self._cache.get(source)  # a neighbour's fetch may have brought it meanwhile
        if cached is not None:
            return cached
        place = TopicPartition(source.topic, source.partition, source.offset)
        consumer.assign([place])
        try:
            record = self._first(consumer, request)
            for message in consumer.consume(NEIGHBOURS_MAX, timeout=0):
                if message.error() is None:
                    self._cache.put(record_of(message))
        finally:
            consumer.unassign()
        if record.offset != source.offset:
            raise _missing(source)
        return record

    def _first(self, consumer: Consumer, request: "_Request") -> KafkaRecord:
        source, look_again = request.source, time.monotonic() + LOOK_AGAIN_S
        while time.monotonic() < request.deadline and not self._closed:
            message = consumer.poll(POLL_S)
            if message is None:
                if time.monotonic() > look_again:
                    self._require_exists(consumer, source)
                    look_again = time.monotonic() + LOOK_AGAIN_S
                continue
            error = message.error()
            if error is None:
                return record_of(message)
            if error.code() in GONE_CODES or error.code() == KafkaError._PARTITION_EOF:
                raise _missing(source)
            fault = reading_fault(error, self._settings, source.topic)
            if fault is not None:
                raise fault
        raise unavailable(self._settings, f"payload at {_place(source)} did not come in time")

    def _require_exists(self, consumer: Consumer, source: SourceRef) -> None:
        try:
            low, high = partition_watermarks(
                consumer, self._settings, source.topic, source.partition, LOOK_AGAIN_S
            )
        except BrokerUnavailableError:
            return  # the caller's deadline decides
        if not low <= source.offset < high:
            raise _missing(source)


class _Request:
    """One fetch: which record, until when (monotonic s), and who waits for it."""

    def __init__(self, source: SourceRef, deadline: float, found: "Future[KafkaRecord]") -> None:
        self.source = source
        self.deadline = deadline
        self.found = found


class _RecordCache:
    """Least recently used records, bounded by bytes. Safe from any thread."""

    def __init__(self, bytes_max: int) -> None:
        self._max = bytes_max
        self._bytes = 0
        self._records: OrderedDict[SourceRef, KafkaRecord] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: SourceRef) -> KafkaRecord | None:
        with self._lock:
            record = self._records.get(source)
            if record is not None:
                self._records.move_to_end(source)
            return record

    def put(self, record: KafkaRecord) -> None:
        size = len(record.value or b"")
        if size > min(CACHE_RECORD_BYTES_MAX, self._max):
            return
        with self._lock:
            if record.source in self._records:
                return
            self._records[record.source] = record
            self._bytes += size
            while self._bytes > self._max:
                _, old = self._records.popitem(last=False)
                self._bytes -= len(old.value or b"")


def _place(source: SourceRef) -> str:
    return f"{source.topic}[{source.partition}]@{source.offset}"


def _missing(source: SourceRef) -> PayloadMissingError:
    return PayloadMissingError(
        f"no payload at {_place(source)}: it was never written there, or Kafka no longer keeps it; "
        "submit the job again with its payload"
    )


def _payload_of(record: KafkaRecord, location: PayloadLocation) -> bytes:
    data = record.value or b""
    if location.inline:
        try:
            data = decode_spec(record.value, record.content_type).payload or b""
        except InvalidRecordError as error:
            raise PayloadCorruptError(
                f"the submission at {_place(location.source)} is not a job ({error}); "
                "submit the job again"
            ) from error
    verify(data, location)
    return data
