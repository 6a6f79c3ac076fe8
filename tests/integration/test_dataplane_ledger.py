"""The ledger on both kinds of broker: order, duplicates, corruption, a broker that dies."""

import asyncio
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from dataplane.broker.apache import ApacheBroker
from dataplane.broker.embedded import EmbeddedBroker
from dataplane.kafka import open_admin
from dataplane.ledger import LedgerReader, LedgerWriter, read_ledger
from dataplane.producer import RecordProducer
from idl.errors import LedgerCorruptError, PlatformFaultError
from idl.ids import PoolName
from idl.ledger import Finished, LedgerEntry, TermStarted
from idl.settings import KafkaSettings
from idl.topics import TopicNames
from tests.integration.conftest import create_topics, fresh_settings, require_apache

pytestmark = pytest.mark.kafka
POOL = PoolName("main")


def _entry(seq: int, term: int = 1, leader: str = "a") -> LedgerEntry:
    return LedgerEntry(
        term=term,
        leader=leader,
        incarnation=1,
        seq=seq,
        at_ms=0,
        decisions=(TermStarted(pool="main", previous_term=term - 1),)
        if seq == 1
        else (Finished(job=f"job-{seq}", attempt=1),),
    )


class Follower:
    """Collects what a reader hands over."""

    def __init__(self, settings: KafkaSettings, start: int = 0) -> None:
        self.entries: list[tuple[int, LedgerEntry]] = []
        self.errors: list[PlatformFaultError] = []
        self.stalls: list[bool] = []
        self._news = asyncio.Event()
        self.reader = LedgerReader(
            settings,
            POOL,
            start,
            self._on_entries,
            loop=asyncio.get_running_loop(),
            on_error=self._on_error,
            on_stall=self._on_stall,
        )
        self.reader.start()

    def _on_entries(self, batch: list[tuple[int, LedgerEntry]]) -> None:
        self.entries += batch
        self.reader.done(len(batch))
        self._news.set()

    def _on_error(self, error: PlatformFaultError) -> None:
        self.errors.append(error)
        self._news.set()

    def _on_stall(self, stalled: bool, _why: str) -> None:
        self.stalls.append(stalled)
        self._news.set()

    async def until(self, count: int = 0, errors: int = 0, stalls: int = 0) -> None:
        async with asyncio.timeout(30):
            while not (
                len(self.entries) >= count
                and len(self.errors) >= errors
                and len(self.stalls) >= stalls
            ):
                assert errors or not self.errors, self.errors
                self._news.clear()
                await self._news.wait()

    def calm(self) -> None:
        """Forgets a stall of the start; it has read since."""
        assert self.entries and not self.reader.stalled
        self.stalls.clear()


async def test_append_and_read_back(broker_settings: KafkaSettings) -> None:
    writer, follower = LedgerWriter(broker_settings, POOL), Follower(broker_settings)
    offsets = [await writer.append(_entry(seq)) for seq in range(1, 6)]
    await follower.until(count=5)
    assert offsets == list(range(5))
    assert follower.entries == [(i, _entry(i + 1)) for i in range(5)]
    assert list(read_ledger(broker_settings, POOL)) == follower.entries
    assert list(read_ledger(broker_settings, POOL, 1, 3)) == follower.entries[1:3]
    assert await follower.reader.end_offset() == 5
    assert writer.oldest_pending_ms == 0
    await follower.reader.aclose()
    await writer.aclose()


async def test_two_writers_interleave_in_one_order(broker_settings: KafkaSettings) -> None:
    """A zombie and its successor both append: every reader sees the same order, each writer's
    own entries in the order of its calls. (Which of them count is `core.validity`'s matter.)"""
    old, new = LedgerWriter(broker_settings, POOL), LedgerWriter(broker_settings, POOL)
    appends = []
    for seq in range(1, 101):
        appends += [old.append(_entry(seq, 1, "old")), new.append(_entry(seq, 2, "new"))]
    offsets = await asyncio.gather(*appends)
    assert sorted(offsets) == list(range(200))
    found = dict(read_ledger(broker_settings, POOL))
    for term in (1, 2):
        assert [e.seq for e in found.values() if e.term == term] == list(range(1, 101))
    followers = [Follower(broker_settings) for _ in range(2)]
    for follower in followers:
        await follower.until(count=200)
        assert follower.entries == list(found.items())
        await follower.reader.aclose()
    await old.aclose()
    await new.aclose()


async def test_the_same_entry_twice_is_two_records(broker_settings: KafkaSettings) -> None:
    """A caller in doubt repeats the entry; it is for readers to void the second (term, seq)."""
    writer = LedgerWriter(broker_settings, POOL)
    assert [await writer.append(_entry(1)) for _ in range(2)] == [0, 1]
    found = [entry for _, entry in read_ledger(broker_settings, POOL)]
    assert found == [_entry(1)] * 2
    await writer.aclose()


async def test_reader_starts_at_an_offset(broker_settings: KafkaSettings) -> None:
    writer = LedgerWriter(broker_settings, POOL)
    await asyncio.gather(*(writer.append(_entry(seq)) for seq in range(1, 11)))
    follower = Follower(broker_settings, start=7)
    await follower.until(count=3)
    assert [offset for offset, _ in follower.entries] == [7, 8, 9]
    await follower.reader.aclose()
    await writer.aclose()


async def test_corrupt_record_stops_every_reader(broker_settings: KafkaSettings) -> None:
    writer = LedgerWriter(broker_settings, POOL)
    await writer.append(_entry(1))
    producer = RecordProducer(broker_settings)
    await producer.produce(TopicNames(broker_settings.prefix).ledger(POOL), b"junk")
    await writer.append(_entry(2))
    follower = Follower(broker_settings)
    await follower.until(errors=1)
    assert [offset for offset, _ in follower.entries] == [0]
    assert isinstance(follower.errors[0], LedgerCorruptError) and follower.errors[0].offset == 1
    with pytest.raises(LedgerCorruptError, match="offset 1"):
        list(read_ledger(broker_settings, POOL))
    await follower.reader.aclose()
    await producer.aclose()
    await writer.aclose()


async def test_killed_broker_is_a_stall_not_a_hang(tmp_path: Path) -> None:
    """SIGKILL: readers say so, appends fail as retryable within their bound, closing is quick.

    The embedded broker comes back on its port without its records: the reader must not wait for
    ever at an offset that will not come.
    """
    broker = EmbeddedBroker(tmp_path)
    broker.start()
    try:
        settings = create_topics(fresh_settings(broker))
        writer = LedgerWriter(settings, POOL, delivery_timeout_ms=1_000)
        follower = Follower(settings)
        await asyncio.gather(*(writer.append(_entry(seq)) for seq in range(1, 4)))
        await follower.until(count=3)
        follower.calm()
        os.kill(broker.pids[0], signal.SIGKILL)
        pending = [writer.append(_entry(4)), writer.append(_entry(5))]
        assert writer.oldest_pending_ms > 0
        await follower.until(count=3, stalls=1)
        assert follower.stalls == [True] and follower.reader.stalled
        failed = await asyncio.gather(*pending, return_exceptions=True)
        assert all(isinstance(e, PlatformFaultError) and e.retryable for e in failed)
        port = broker.bootstrap
        broker.start()
        assert broker.bootstrap == port
        create_topics(settings)
        again = await writer.append(_entry(4))
        assert again == 0, "the memory of the embedded broker is gone"
        await follower.until(errors=1)
        assert "its broker lost them" in str(follower.errors[0])
        await follower.reader.aclose()
        await writer.aclose()
    finally:
        broker.stop()


def _leader_of(settings: KafkaSettings, topic: str) -> int:
    """Node that leads partition 0; a node that is asked just after creation may not know yet."""
    admin = open_admin(settings)
    for _ in range(100):
        found = admin.list_topics(timeout=10).topics
        if topic in found and found[topic].partitions[0].leader > 0:
            return int(found[topic].partitions[0].leader)
        time.sleep(0.1)
    raise AssertionError(f"no leader of {topic}")


@pytest.mark.apache
@pytest.mark.slow
async def test_killed_leader_of_three_loses_nothing(tmp_path: Path) -> None:
    """Three nodes, the ledger's leader killed under load: every acknowledged entry is there, in
    order, once or repeated by nobody; both changes are reported; the node comes back."""
    require_apache()
    broker = ApacheBroker(tmp_path, nodes=3)
    broker.start()
    try:
        settings = create_topics(
            msgspec.structs.replace(fresh_settings(broker), replication_factor=3)
        )
        writer, follower = LedgerWriter(settings, POOL), Follower(settings)
        leader = _leader_of(settings, TopicNames(settings.prefix).ledger(POOL))
        appends = [writer.append(_entry(seq)) for seq in range(1, 101)]
        await appends[0]
        await follower.until(count=1)
        follower.calm()
        os.kill(broker.pids[leader - 1], signal.SIGKILL)
        appends += [writer.append(_entry(seq)) for seq in range(101, 201)]
        assert await asyncio.gather(*appends) == list(range(200))
        await follower.until(count=200, stalls=2)
        assert [entry.seq for _, entry in follower.entries] == list(range(1, 201))
        assert follower.stalls == [True, False]
        assert not broker.healthy() and len(broker.pids) == 2
        await asyncio.to_thread(broker.start)
        assert broker.healthy()
        await follower.reader.aclose()
        await writer.aclose()
    finally:
        broker.stop()


async def test_hung_broker_is_a_stall_and_recovers(tmp_path: Path) -> None:
    """SIGSTOP, then SIGCONT: nothing is lost, and both changes are reported."""
    broker = EmbeddedBroker(tmp_path)
    broker.start()
    try:
        settings = create_topics(fresh_settings(broker))
        writer, follower = LedgerWriter(settings, POOL), Follower(settings)
        await writer.append(_entry(1))
        await follower.until(count=1)
        follower.calm()
        os.kill(broker.pids[0], signal.SIGSTOP)
        pending = writer.append(_entry(2))
        await follower.until(count=1, stalls=1)
        os.kill(broker.pids[0], signal.SIGCONT)
        assert await pending >= 1
        await follower.until(count=2, stalls=2)
        assert follower.stalls == [True, False]
        assert follower.errors == []
        await follower.reader.aclose()
        await writer.aclose()
    finally:
        broker.stop()
