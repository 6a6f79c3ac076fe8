"""The ledger as a log: append an entry, read entries back in order (DESIGN, idea 2)."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Final

from dataplane.producer import RecordProducer
from dataplane.read import read_range
from dataplane.tail import KafkaRecord, Tail
from idl.codec import MSGPACK, decode_entry, encode
from idl.errors import LedgerCorruptError, PlatformFaultError
from idl.ids import PoolName
from idl.jobs import SourceRef
from idl.ledger import LedgerEntry
from idl.limits import INBOX_RECORDS_MAX
from idl.settings import KafkaSettings
from idl.topics import TopicNames

LEDGER_DELIVERY_TIMEOUT_MS: Final = 30_000
"""An append is given up after this: well past a broker's failover (2–9 s), short enough to tell."""
_PARTITION: Final = 0
"""The ledger has one partition: one order."""


class LedgerWriter:
    """Appends with an idempotent producer of its own (`acks=all`), without lingering.

    After a failure the entry may or may not be in the ledger: append *the same* entry again, never
    another one under its (term, seq); readers void the duplicate. The producer that failed is
    abandoned with everything behind the failed entry, so that no later entry overtakes it.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        pool: PoolName,
        *,
        delivery_timeout_ms: int = LEDGER_DELIVERY_TIMEOUT_MS,
    ) -> None:
        """Connects in the background. Raises ConfigError where settings are refused."""
        self._settings = settings
        self._topic = TopicNames(settings.prefix).ledger(pool)
        self._timeout_ms = delivery_timeout_ms
        self._lock = threading.Lock()
        self._pending: deque[tuple[float, Future[SourceRef]]] = deque()
        self._producer = self._open()

    def _open(self) -> RecordProducer:
        return RecordProducer(
            self._settings,
            name="ledger",
            delivery_timeout_ms=self._timeout_ms,
            linger_ms=0,
        )

    def append(self, entry: LedgerEntry) -> "asyncio.Future[int]":
        """Sends now (order of calls = order in the log); the future gives its offset.

        Call on the running loop, after `ensure_topics`. Fails with
        PlatformFaultError(retryable=True) when not acknowledged in time; all later entries not
        yet acknowledged then fail too.
        """
        return asyncio.wrap_future(self._send(entry))

    def append_sync(self, entry: LedgerEntry) -> int:
        """`append` for tools without a loop. Returns the offset."""
        return self._send(entry).result()

    def _send(self, entry: LedgerEntry) -> "Future[int]":
        with self._lock:
            producer = self._producer
            sent = producer.try_send(
                self._topic, encode(entry), content_type=MSGPACK, partition=_PARTITION
            )
            if sent is None:
                raise PlatformFaultError(
                    "too many ledger appends wait for Kafka; wait until one is acknowledged",
                    retryable=True,
                )
            self._pending.append((time.monotonic(), sent))
        offset: Future[int] = Future()
        offset.set_running_or_notify_cancel()
        sent.add_done_callback(lambda done: self._settle(producer, done, offset))
        return offset

    def _settle(
        self, producer: RecordProducer, done: "Future[SourceRef]", offset: "Future[int]"
    ) -> None:
        error = done.exception()
        with self._lock:
            while self._pending and self._pending[0][1].done():
                self._pending.popleft()
            if error is not None and producer is self._producer:
                self._producer = self._open()
                producer.abandon()
        if error is None:
            offset.set_result(done.result().offset)
        else:
            offset.set_exception(error)

    @property
    def oldest_pending_ms(self) -> float:
        """How long the oldest unacknowledged append has waited; 0 where there is none.

        Above a second or so Kafka stalls: a state to show, not a reason to resign.
        """
        with self._lock:
            waiting = next((at for at, sent in self._pending if not sent.done()), None)
        return 0.0 if waiting is None else (time.monotonic() - waiting) * 1000

    def close(self, timeout_s: float = 5.0) -> None:
        """Gives pending appends `timeout_s`, fails the rest. Idempotent."""
        self._producer.close(timeout_s)

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
        await asyncio.to_thread(self.close)


class LedgerReader:
    """Follows the ledger from an offset; batches of (offset, entry) arrive on `loop`.

    An entry that cannot be decoded stops it: `on_error(LedgerCorruptError)`, after the entries
    before it were handed over. It does not judge validity (`dataplane.core.validity`).
    """

    def __init__(
        self,
        settings: KafkaSettings,
        pool: PoolName,
        start: int,
        on_entries: Callable[[list[tuple[int, LedgerEntry]]], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        on_error: Callable[[PlatformFaultError], None] | None = None,
        on_stall: Callable[[bool, str], None] | None = None,
        unacknowledged_max: int = INBOX_RECORDS_MAX,
    ) -> None:
        """`start`: first offset wanted. Without `loop` callbacks run on the reader's thread."""
        self._topic = TopicNames(settings.prefix).ledger(pool)
        self._on_entries = on_entries
        self._on_error = on_error
        self._tail = Tail(
            settings,
            {(self._topic, _PARTITION): start},
            self._decode,
            loop=loop,
            on_error=on_error,
            on_stall=on_stall,
            unacknowledged_max=unacknowledged_max,
            name="ledger-reader",
        )

    def start(self) -> None:
        """Starts reading; returns at once."""
        self._tail.start()

    def done(self, count: int) -> None:
        """`count` entries are dealt with (backpressure, see Tail)."""
        self._tail.done(count)

    async def end_offset(self, timeout_s: float = 5.0) -> int:
        """Next ledger offset to be written. Raises BrokerUnavailableError."""
        return (await self._tail.end_offsets(timeout_s))[(self._topic, _PARTITION)]

    @property
    def stalled(self) -> bool:
        """The ledger's broker does not answer."""
        return self._tail.stalled

    def close(self) -> None:
        """Stops. Idempotent."""
        self._tail.close()

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
        await self._tail.aclose()

    def _decode(self, records: list[KafkaRecord]) -> None:
        entries: list[tuple[int, LedgerEntry]] = []
        corrupt: LedgerCorruptError | None = None
        for record in records:
            try:
                entries.append((record.offset, decode_entry(record.offset, record.value)))
            except LedgerCorruptError as error:
                corrupt = error
                break
        if entries:
            self._on_entries(entries)
        if corrupt is not None:
            self._tail.stop()
            if self._on_error is not None:
                self._on_error(corrupt)


def read_ledger(
    settings: KafkaSettings, pool: PoolName, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, LedgerEntry]]:
    """Entries `start` ≤ offset < `end` (default: the end as of the call), void ones included.

    Raises LedgerCorruptError, ConfigError (no such ledger), BrokerUnavailableError.
    """
    topic = TopicNames(settings.prefix).ledger(pool)
    for record in read_range(settings, topic, _PARTITION, start, end):
        yield record.offset, decode_entry(record.offset, record.value)
