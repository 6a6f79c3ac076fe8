"""Following topics by explicit offsets, on one thread, with backpressure.

`confluent_kafka.Consumer` is not for several threads: every call on it is made by the tail's own
thread, and other threads hand it commands through a queue. (Tools that read once use `read`.)
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from dataplane.kafka import FETCH_WAIT_MS, STATISTICS_MS, BrokerWatch, checked, log
from dataplane.read import (
    open_consumer,
    partition_watermarks,
    read_range,
    reading_fault,
    scan,
    watermarks,
)
from dataplane.records import BEGINNING, END, KafkaRecord, Partition, record_of
from idl.errors import BrokerUnavailableError, PlatformFaultError
from idl.limits import INBOX_RECORDS_MAX
from idl.settings import KafkaSettings

__all__ = [
    "BEGINNING", "END", "KafkaRecord", "Partition", "Tail", "read_range", "scan", "watermarks",
]  # fmt: skip

POLL_S: Final = 0.05
"""librdkafka's poll cannot be woken: this bounds how long a command or `close` waits."""
BATCH_RECORDS_MAX: Final = 500
"""One callback on the loop: keeps a step there short."""
BLOCKED_S_MAX: Final = 1.0
"""How long a full tail just waits. Then it pauses its partitions, so that it can go on asking
whether the broker lives; pausing throws away what was read ahead, so not at once."""
WATERMARK_TIMEOUT_S: Final = 2.0
BRISK_FETCH_WAIT_MS: Final = 25
"""Of a tail that once stood by. librdkafka has one fetch at a broker at a time: a partition that
becomes ready a moment after the others waits until theirs is answered (measured: 0.1–0.5 s)."""
STANDBY_METADATA_MS: Final = 15 * 60_000
"""librdkafka forgets topics that it does not read after three refreshes, 3 s here: a standby that
waited longer had to ask for their leaders again when it was elected, 0.15 to 0.3 s."""
UNKNOWN_S: Final = 60.0
"""A broker that was killed does not know its partitions until it has loaded them: seconds, and on a
crowded machine (28 runnable processes on two cores) more than two. Then they are really gone."""
CHECK_AFTER_GO_S: Final = 0.2
"""A tail that leaves its standby reads first: asking where partitions end takes a round trip each,
and Apache Kafka itself refuses a position that does not exist."""


class Tail:
    """Follows assigned partitions (never a consumer group) on one thread of its own.

    Batches arrive on `loop` (or on the tail's own thread where loop is None) through `on_records`.
    At most `unacknowledged_max` records are handed over and not yet acknowledged by `done(n)`;
    beyond it the tail stops reading and Kafka keeps the rest.
    All methods are safe from any thread. `on_error` gets what ends the tail (records gone,
    topic gone, not authorised): it reads nothing more. `on_stall(True, why)` says that the
    leaders of its partitions do not answer, `on_stall(False, "")` that they answer again.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        start: Mapping[tuple[str, int], int],
        on_records: Callable[[list[KafkaRecord]], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        on_error: Callable[[PlatformFaultError], None] | None = None,
        on_stall: Callable[[bool, str], None] | None = None,
        unacknowledged_max: int = INBOX_RECORDS_MAX,
        name: str = "tail",
        standby: bool = False,
    ) -> None:
        """`start`: (topic, partition) → first offset wanted, or BEGINNING or END.

        `standby`: connects, finds the partitions' leaders, and reads nothing before `go`.
        """
        self._settings = settings
        self._on_records = on_records
        self._on_error = on_error
        self._on_stall = on_stall
        self._loop = loop
        self._name = name
        self._limit = unacknowledged_max
        self._next = {Partition(*where): offset for where, offset in start.items()}
        self._paused: set[str] = set()
        self._blocked_since: float | None = None
        self._held = False
        self._outstanding = 0
        self._lock = threading.Lock()
        self._commands: queue.SimpleQueue[Callable[[Consumer], None]] = queue.SimpleQueue()
        self._watch = BrokerWatch()
        self._checked = False
        self._check_at_s = 0.0
        self._unknown_since: float | None = None
        """When a broker first said that it does not know a partition of ours."""
        self._standby = standby
        self._assigned = False
        self._ending = threading.Event()
        self._ended = False
        self._asked: set[Future[dict[tuple[str, int], int]]] = set()
        self._silent = self._broken = False
        self._thread = threading.Thread(target=self._run, name=f"kafka-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread; returns at once."""
        self._thread.start()

    def done(self, count: int) -> None:
        """`count` records that were handed over are dealt with."""
        with self._lock:
            self._outstanding -= count
        self._commands.put(lambda _consumer: None)  # wakes a tail that is full

    def pause(self, topic: str) -> None:
        """Stops reading `topic`. Batches handed over before this took effect still arrive."""
        self._commands.put(lambda consumer: self._set_paused(consumer, topic, True))

    def resume(self, topic: str) -> None:
        """Goes on where `pause` stopped; nothing is skipped or repeated."""
        self._commands.put(lambda consumer: self._set_paused(consumer, topic, False))

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Goes on at `offset`; batches handed over before this took effect still arrive."""
        where = Partition(topic, partition)

        def move(_consumer: Consumer) -> None:
            self._next[where] = offset
            self._checked = self._assigned = False

        self._commands.put(move)

    def go(self, start: Mapping[tuple[str, int], int]) -> None:
        """Ends the standby: reads from `start` at once, and checks the positions while it reads."""
        following = {Partition(*where): offset for where, offset in start.items()}

        def read(consumer: Consumer) -> None:
            self._next, self._standby = following, False
            self._checked, self._check_at_s = False, time.monotonic() + CHECK_AFTER_GO_S
            self._assign(consumer)

        self._commands.put(read)

    async def end_offsets(
        self, timeout_s: float = 5.0, *, exact: bool = True
    ) -> dict[tuple[str, int], int]:
        """Next offset to be written, per partition. Raises BrokerUnavailableError.

        Asked on the thread that reads. Not `exact`: the embedded broker's own answer, short of
        the last batch, in one round trip; an exact one keeps that thread for up to 0.3 s there.
        """
        found: Future[dict[tuple[str, int], int]] = Future()
        found.set_running_or_notify_cancel()
        self._asked.add(found)

        def ask(consumer: Consumer) -> None:
            try:
                found.set_result(
                    {p: self._marks(consumer, p, timeout_s, exact)[1] for p in self._next}
                )
            except PlatformFaultError as error:
                found.set_exception(error)
            self._asked.discard(found)

        self._commands.put(ask)
        if self._ended:
            self._refuse_asked()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(found), timeout_s * 2)
        except TimeoutError as error:
            raise BrokerUnavailableError(
                f"Kafka at {self._settings.bootstrap} did not say where its topics end; "
                "is it running?"
            ) from error

    @property
    def stalled(self) -> bool:
        """The leaders of its partitions do not answer."""
        return bool(self._watch.why)

    def stop(self) -> None:
        """Ends without waiting; no callback runs after it."""
        self._silent = True
        self._ending.set()
        self._commands.put(lambda _consumer: None)

    def close(self, timeout_s: float = 5.0) -> None:
        """`stop`, and waits for the thread and the connection to end. Idempotent."""
        self.stop()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
        await asyncio.to_thread(self.close)

    # --- the tail's own thread from here on ---

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._ended = True
            self._refuse_asked()

    def _refuse_asked(self) -> None:
        while self._asked:
            with contextlib.suppress(KeyError, InvalidStateError):
                self._asked.pop().set_exception(
                    PlatformFaultError(f"{self._name} has ended and reads no more; open another")
                )

    def _follow(self) -> None:
        try:
            extra: dict[str, object] = {
                "statistics.interval.ms": STATISTICS_MS, "stats_cb": self._look,
            }  # fmt: skip
            if self._standby:
                wait_ms = min(FETCH_WAIT_MS[self._settings.kind], BRISK_FETCH_WAIT_MS)
                extra["fetch.wait.max.ms"] = wait_ms
                extra["metadata.max.age.ms"] = STANDBY_METADATA_MS
            consumer = open_consumer(self._settings, self._name, **extra)
        except PlatformFaultError as error:
            self._fail(error)
            return
        try:
            while not self._ending.is_set():
                self._step(consumer)
        except PlatformFaultError as error:
            self._fail(error)
        except KafkaException as error:
            self._fail(checked(error, f"{self._name} reading", self._settings))
        except Exception as error:  # noqa: BLE001 - a thread that dies in silence would hang others
            log.exception("%s: our bug", self._name)
            self._fail(PlatformFaultError(f"{self._name} stopped by a bug of ours: {error!r}"))
        finally:
            consumer.close()

    def _step(self, consumer: Consumer) -> None:
        """Commands, then what was read; the check of positions waits for a broker to answer."""
        self._do_commands(consumer)
        if not self._checked and time.monotonic() >= self._check_at_s:
            self._check_positions(consumer)
        if self._standby:
            self._wait_for_go(consumer)
            return
        if self._checked and not self._assigned:
            self._assign(consumer)
        if self._is_full():
            if self._wait_for_room(consumer):
                return
        elif self._held:
            self._hold(consumer, False)
        first = consumer.poll(POLL_S)
        if first is None:
            return
        room = self._limit - self._outstanding
        count = max(0, min(room, BATCH_RECORDS_MAX) - 1)
        rest = consumer.consume(count, timeout=0) if count else []
        batch: list[KafkaRecord] = []
        for message in (first, *rest):
            error = message.error()
            if error is not None:
                self._hand_over(batch)
                batch = []
                self._judge(error, f"{message.topic()}[{message.partition()}]")
            else:
                batch.append(record_of(message))
        self._hand_over(batch)

    def _wait_for_go(self, consumer: Consumer) -> None:
        """On the commands, for a poll cannot be woken; callbacks are served between."""
        with contextlib.suppress(queue.Empty):
            self._commands.get(timeout=POLL_S)(consumer)
        if self._standby:
            consumer.poll(0)

    def _do_commands(self, consumer: Consumer) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()(consumer)

    def _is_full(self) -> bool:
        full = self._outstanding >= self._limit
        if not full:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = time.monotonic()
        return full

    def _wait_for_room(self, consumer: Consumer) -> bool:
        """True: waited without polling. False: partitions are held, polling is safe."""
        since = self._blocked_since or 0.0
        if not self._held and time.monotonic() - since < BLOCKED_S_MAX:
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=POLL_S)(consumer)
            return True
        if not self._held:
            self._hold(consumer, True)
        return False

    def _hold(self, consumer: Consumer, held: bool) -> None:
        self._held = held
        partitions = self._partitions(lambda p: p.topic not in self._paused)
        if not self._assigned:
            return
        if held:
            consumer.pause(partitions)
        else:
            consumer.resume(partitions)

    def _set_paused(self, consumer: Consumer, topic: str, paused: bool) -> None:
        if paused == (topic in self._paused):
            return
        partitions = self._partitions(lambda p: p.topic == topic)
        if paused:
            self._paused.add(topic)
        else:
            self._paused.discard(topic)
        if not self._assigned:
            return  # `_assign` will see to it
        if paused:
            consumer.pause(partitions)
        elif not self._held:
            consumer.resume(partitions)

    def _partitions(self, wanted: Callable[[Partition], bool]) -> list[TopicPartition]:
        return [TopicPartition(p.topic, p.partition) for p in self._next if wanted(p)]

    def _assign(self, consumer: Consumer) -> None:
        """(Re)assigns everything at its next offset.

        Pauses do not survive an assignment in librdkafka, so they are made again.
        """
        self._assigned = True
        consumer.assign([TopicPartition(p.topic, p.partition, o) for p, o in self._next.items()])
        quiet = self._partitions(lambda p: self._held or p.topic in self._paused)
        if quiet:
            consumer.pause(quiet)

    def _marks(
        self, consumer: Consumer, where: Partition, timeout_s: float, exact: bool = True
    ) -> tuple[int, int]:
        return partition_watermarks(consumer, self._settings, *where, timeout_s, exact=exact)

    def _check_positions(self, consumer: Consumer) -> None:
        """Resolves BEGINNING and END, and refuses positions that do not exist (any more).

        Tansu answers a fetch beyond the end with silence, for ever: we look ourselves.
        """
        for where, offset in list(self._next.items()):
            try:
                low, high = self._marks(consumer, where, WATERMARK_TIMEOUT_S)
            except PlatformFaultError as error:
                self._bear(error)
                return  # asked again in the next step; the watch reports a stall
            self._unknown_since = None
            if self._standby:
                continue  # asked only to be connected; `go` brings the positions
            if offset < 0:
                self._next[where] = low if offset == BEGINNING else high
            elif not low <= offset <= high:
                raise PlatformFaultError(
                    f"{where.topic}[{where.partition}] holds offsets {low} to {high - 1} and we "
                    f"were at {offset}: its records were deleted or its broker lost them; "
                    "start again with fresh state, or restore the topic"
                )
        self._checked = True

    def _bear(self, error: PlatformFaultError) -> None:
        """Raises what does not pass by itself, and after UNKNOWN_S what might have."""
        if isinstance(error, BrokerUnavailableError):
            return
        now = time.monotonic()
        self._unknown_since = self._unknown_since or now
        if not error.retryable or now - self._unknown_since > UNKNOWN_S:
            raise error
        log.warning("%s: %s", self._name, error)

    def _hand_over(self, batch: list[KafkaRecord]) -> None:
        if not batch:
            return
        for record in batch:
            self._next[Partition(record.topic, record.partition)] = record.offset + 1
        with self._lock:
            self._outstanding += len(batch)
        self._call(self._take, batch)

    def _take(self, batch: list[KafkaRecord]) -> None:
        """Hands a batch on. A bug there ends the reading: what was not taken in is not passed."""
        if self._broken:
            return
        try:
            self._on_records(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            self._broken = True
            log.exception("%s: a bug in what takes the records in", self._name)
            first = f"{batch[0].topic}[{batch[0].partition}]@{batch[0].offset}"
            self._fail(
                PlatformFaultError(
                    f"{self._name}: records from {first} on were not taken: {error!r}"
                )
            )

    def _judge(self, error: KafkaError, where: str) -> None:
        fault = reading_fault(error, self._settings, where)
        if fault is not None:
            raise fault
        log.info("reading %s: %s (librdkafka tries again)", where, error.str())

    def _look(self, statistics: str) -> None:
        active = set() if self._held else {p for p in self._next if p.topic not in self._paused}
        if not self._watch.look(statistics, {(p.topic, p.partition) for p in active}):
            return
        if not self._watch.why:
            self._checked = False  # the broker may have come back without our records
        if self._on_stall is not None:
            self._call(self._on_stall, bool(self._watch.why), self._watch.why)

    def _fail(self, error: PlatformFaultError) -> None:
        self._ending.set()
        if self._on_error is not None:
            self._call(self._on_error, error)
        else:
            log.error("%s stopped: %s", self._name, error)

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        def unless_closed() -> None:
            if not self._silent:
                callback(*arguments)

        if self._loop is None:
            unless_closed()
            return
        try:
            self._loop.call_soon_threadsafe(unless_closed)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self.stop()
