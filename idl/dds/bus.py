"""The bus: one DDS participant, one WaitSet thread, batches handed to an asyncio loop.

Measured fastest of four bridges, and the only one that never blocked a writer (facts/dds.md).
Exceptions in DDS callbacks are only printed by the wheel, so there are no callbacks here.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from cyclonedds.core import (
    DDSException,
    GuardCondition,
    InstanceState,
    ReadCondition,
    SampleState,
    ViewState,
    WaitSet,
)  # fmt: skip
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.internal import InvalidSample
from cyclonedds.pub import DataWriter, Publisher
from cyclonedds.sub import DataReader, Subscriber
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from idl.dds.gathering import Gathering
from idl.dds.topics import DdsTopic, partition_qos
from idl.dds.types import Envelope, from_wire, to_wire
from idl.envelope import Message
from idl.errors import PlatformFaultError

TAKE_MAX: Final = 256
"""Samples per hop to the loop: amortises the hop, keeps one hop under a few ms."""

QOS_CHECK_S: Final = 1.0
"""How often mismatches are looked for; at least as often the reading thread wakes."""

LOCAL_DOMAIN_IDS: Final = 200
"""Domain ids within a process (Cyclone allows up to 230)."""

_local_ids = itertools.cycle(range(LOCAL_DOMAIN_IDS))
"""Cyclone has one configuration per domain id and process. The id on the network comes from the
configuration (ExternalDomainId), so every bus takes an id of its own: many agents may live in one
process (tests, simulated nodes)."""

log = logging.getLogger(__name__)

_Reader = tuple[str, DataReader[Envelope]]
"""A topic's name and its reader."""


def _refused(error: DDSException) -> PlatformFaultError:
    return PlatformFaultError(
        f"DDS could not start ({error.msg or error}): is its UDP port taken, or does the "
        "interface not exist? Choose another domain or interface in the cluster file"
    )


class LocalDomain:
    """One configured Cyclone domain of this process: sockets and threads of its own.

    Usually one per bus. Many simulated nodes may share one (benchmarks): a participant each.
    """

    def __init__(self, xml: str) -> None:
        """Raises PlatformFaultError."""
        self.id = next(_local_ids)
        try:
            self._domain = Domain(self.id, xml)
        except DDSException as error:
            raise _refused(error) from error

    def close(self) -> None:
        """Closes the sockets now; the wheel would wait for the last reference to everything in it.
        dds_delete(domain) deletes all that is in it."""
        self._domain._delete(self._domain._ref)


class Bus:
    """Reads and writes signed envelopes. Not thread-safe but for what its own thread does."""

    def __init__(
        self,
        domain: LocalDomain,
        reads: tuple[DdsTopic, ...],
        writes: tuple[DdsTopic, ...],
        deliver: Callable[[list[Message]], None],
        *,
        shards: int,
        own_name: str,
        addressees: tuple[str, ...],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """`deliver` and `on_failure` run on the loop that calls `start`. `own_name`: the node, or
        the coordinator, whose shard or address is read; `addressees`: whom addressed topics may be
        written to. Raises PlatformFaultError."""
        self._shards = shards
        try:
            self._participant = DomainParticipant(domain.id)
            self._topics = {
                t.name: Topic(self._participant, t.name, Envelope) for t in {*reads, *writes}
            }
            self._writes = writes
            self._writers: dict[tuple[str, str], DataWriter[Envelope]] = {}
            self._make_writers(addressees)
            self._readers = {t: self._reader(t, t.read(own_name, shards)) for t in reads}
        except DDSException as error:
            raise _refused(error) from error
        self._deliver, self._on_failure = deliver, on_failure
        self._closing = GuardCondition(self._participant)
        self._thread: threading.Thread | None = None
        self._closed = False
        self.received = 0
        self.write_failures = 0
        self.incompatible_qos = 0
        self._qos_check_at = 0.0
        self.failure: Exception | None = None
        """What ended the reading thread: nothing is heard any more."""

    def address(self, names: Iterable[str]) -> None:
        """Addressed topics may be written to these coordinators too. Raises PlatformFaultError.

        Who has left the membership keeps its writers: nobody reads what is not written there.
        """
        if self._closed:
            return
        try:
            self._make_writers(names)
        except DDSException as error:
            raise _refused(error) from error

    def _make_writers(self, addressees: Iterable[str]) -> None:
        for topic in self._writes:
            for partition in topic.written(self._shards, addressees):
                if (topic.name, partition) not in self._writers:
                    self._writers[topic.name, partition] = self._writer(topic, partition)

    def _writer(self, topic: DdsTopic, partition: str) -> DataWriter[Envelope]:
        publisher = Publisher(self._participant, qos=partition_qos(partition))
        return DataWriter(publisher, self._topics[topic.name], topic.qos())

    def _reader(self, topic: DdsTopic, partitions: tuple[str, ...]) -> DataReader[Envelope]:
        subscriber = Subscriber(self._participant, qos=partition_qos(*partitions))
        return DataReader(subscriber, self._topics[topic.name], topic.qos())

    def start(self) -> None:
        """Starts the reading thread; call on the loop that is to receive."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._read, args=(loop,), name="dds", daemon=True)
        self._thread.start()

    def publish(self, topic: DdsTopic, message: Message, to: str = "") -> None:
        """Writes a sealed message. A full or stalled peer is counted, never waited for.

        `to`: the one addressee of an addressed topic; everybody where it is nobody we know.
        """
        if self._closed:
            return
        name = to if topic.route == "addressee" else message.key
        writer = self._writers.get((topic.name, topic.partition_of(name, self._shards)))
        if writer is None:
            writer = self._writers[topic.name, topic.partition_of("", self._shards)]
        try:
            writer.write(to_wire(message))
        except DDSException as error:
            self.write_failures += 1
            log.warning("dds write failed", extra={"topic": message.topic, "error": str(error)})

    def close(self) -> None:
        """Stops the thread and leaves the domain; what is still said or heard goes nowhere."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._closing.set(True)
            self._thread.join()
            self._thread = None
        self._readers.clear()
        self._writers.clear()
        # Deletes readers and writers too, now: others must see us leave (see LocalDomain.close).
        self._participant._delete(self._participant._ref)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._read_on(loop)
        except Exception as error:
            log.exception("the thread that reads DDS ended")
            self.failure = error
            loop.call_soon_threadsafe(self._on_failure)

    def _read_on(self, loop: asyncio.AbstractEventLoop) -> None:
        waitset = WaitSet(self._participant)
        waitset.attach(self._closing)
        mask = ViewState.Any | SampleState.NotRead | InstanceState.Any
        prompt: list[_Reader] = []
        gathered: list[_Reader] = []
        conditions: list[ReadCondition] = []
        for topic, reader in self._readers.items():
            condition = ReadCondition(reader, mask)
            if topic.gathered:
                gathered.append((topic.name, reader))
                conditions.append(condition)
            else:
                prompt.append((topic.name, reader))
                waitset.attach(condition)
        gathering = Gathering(waitset, conditions)
        while not self._closed:
            wait_s = gathering.wait_s(time.monotonic(), QOS_CHECK_S)
            waitset.wait(duration(seconds=wait_s))  # at once while anything is unread
            batch = self._take(prompt)
            now = time.monotonic()
            if gathering.due(now):
                more = self._take(gathered)
                gathering.was_read(bool(more), now)
                batch += more
            if batch:
                loop.call_soon_threadsafe(self._hand_over, batch)
            self._watch_qos()

    def _hand_over(self, batch: list[Message]) -> None:
        if not self._closed:
            self.received += len(batch)
            self._deliver(batch)

    @staticmethod
    def _take(readers: list[_Reader]) -> list[Message]:
        batch: list[Message] = []
        for name, reader in readers:
            for sample in reader.take(N=TAKE_MAX):
                if not isinstance(sample, InvalidSample):
                    batch.append(from_wire(name, sample))
        return batch

    def _watch_qos(self) -> None:
        """An incompatible type or QoS shows nowhere else (policy 24: type consistency)."""
        now = time.monotonic()
        if now < self._qos_check_at:
            return
        self._qos_check_at = now + QOS_CHECK_S
        for topic, reader in self._readers.items():
            status = reader.get_requested_incompatible_qos_status()  # type: ignore[no-untyped-call] # the wheel has no annotations here
            self._tell_incompatible("writer", topic.name, status)
        for (name, _partition), writer in list(self._writers.items()):
            status = writer.get_offered_incompatible_qos_status()  # type: ignore[no-untyped-call] # as above
            self._tell_incompatible("reader", name, status)

    def _tell_incompatible(self, what: str, topic: str, status: Any) -> None:
        if not status.total_count_change:
            return
        log.error(
            "a %s of this topic does not match ours; is another version running?",
            what,
            extra={"topic": topic, "policy": status.last_policy_id},
        )
        self.incompatible_qos += status.total_count_change  # after the line that explains it
