"""Snapshots on both brokers: written, found, refused, fallen back from; recovery by any of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from controlplane.snapshotter import snapshot
from dataplane import snapshots
from dataplane.core.state import PoolState
from dataplane.ledger import LedgerWriter, read_ledger
from dataplane.producer import RecordProducer
from dataplane.snapshots import delete_ledger_below, newest_head, recover, write_snapshot
from idl import ledger as d
from idl.codec import encode
from idl.errors import LedgerTruncatedError, PlatformFaultError
from idl.settings import ClusterSettings, KafkaSettings, SnapshotSettings
from idl.snapshots import SnapshotHead, head_key
from idl.topics import TopicNames
from outrider.client.view import LedgerView
from tests.integration.conftest import POOL
from tests.unit.core_builders import seen, source, spec

pytestmark = pytest.mark.timeout(60)


class Log:
    """A ledger in Kafka that grows by one job an entry."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.settings = settings
        self.seq = 0
        self.writer = LedgerWriter(settings, POOL)
        self._append(d.TermStarted(pool="main", previous_term=0), seen())

    def _append(self, *decisions: d.Decision) -> None:
        self.seq += 1
        entry = d.LedgerEntry(
            term=1, leader="c1", incarnation=1, seq=self.seq, at_ms=self.seq, decisions=decisions
        )
        self.writer.append_sync(entry)

    def grow(self, entries: int) -> PoolState:
        for _ in range(entries):
            number = self.seq
            job = spec(f"j{number}")
            self._append(d.Ingested(queue="default", source=source(number), job=job))
        return self.state()

    def state(self) -> PoolState:
        """The whole ledger folded."""
        state = PoolState()
        for offset, entry in read_ledger(self.settings, POOL):
            state.apply(offset, entry)
        return state


@pytest.fixture
def log(broker_settings: KafkaSettings) -> Iterator[Log]:
    found = Log(broker_settings)
    yield found
    found.writer.close()


def head_at(settings: KafkaSettings) -> int:
    found = newest_head(settings, POOL)
    return -1 if found is None else found[1].next_offset


def test_recovery_is_the_newest_snapshot_and_the_tail(log: Log) -> None:
    assert recover(log.settings, POOL, worth=0).head is None
    write_snapshot(log.settings, POOL, log.grow(10), 5)
    newest = write_snapshot(log.settings, POOL, log.grow(5), 6)
    whole = log.grow(3)
    found = recover(log.settings, POOL, worth=0)
    assert found.head == newest and found.notes == () and found.state.next_offset == 16
    for offset, entry in read_ledger(log.settings, POOL, found.state.next_offset):
        found.state.apply(offset, entry)
    assert found.state.state_hash() == whole.state_hash() and found.state.digest == whole.digest
    assert recover(log.settings, POOL).head is None, "a short ledger is read whole"


def test_a_large_snapshot_has_many_parts(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_PART_BYTES", 50)
    head = write_snapshot(log.settings, POOL, log.grow(30), 5)
    assert len(head.parts) > 5
    assert recover(log.settings, POOL, worth=0).state.state_hash() == head.state_hash


def spoil(settings: KafkaSettings, value: bytes, slot: int) -> None:
    producer = RecordProducer(settings, name="spoil")
    topic = TopicNames(settings.prefix).snapshots
    producer.send(topic, value, key=head_key(POOL, slot), partition=0).result()
    producer.close()


def but(head: SnapshotHead, **changes: object) -> bytes:
    return encode(replace(head, **changes))


Spoiler = Callable[[SnapshotHead], bytes]


@pytest.mark.parametrize(
    ("why", "spoiled"),
    [
        ("version 7", lambda head: but(head, v=7)),
        ("checksum", lambda head: but(head, checksum="00")),
        ("not of this ledger", lambda head: but(head, next_offset=10_000)),
        ("not the one it saw", lambda head: but(head, last_entry="00")),
        ("cannot be read", lambda _head: b"\x81garbage"),
    ],
)
def test_a_bad_snapshot_is_refused_and_the_one_before_serves(
    log: Log, why: str, spoiled: Spoiler
) -> None:
    good = write_snapshot(log.settings, POOL, log.grow(4), 5)
    spoil(log.settings, spoiled(good), 1)
    said: list[str] = []
    found = recover(log.settings, POOL, worth=0, say=said.append)
    assert found.head == good and len(said) == 1 and why in said[0]


def test_without_a_good_snapshot_the_ledger_is_read_from_its_start(log: Log) -> None:
    head = write_snapshot(log.settings, POOL, log.grow(4), 5)
    for slot in (0, 1, 0, 1):
        spoil(log.settings, but(head, checksum="00"), slot)
    said: list[str] = []
    found = recover(log.settings, POOL, worth=0, say=said.append)
    assert found.head is None and found.state.next_offset == 0
    assert len(said) == 5 and "from its start" in said[-1]


def cluster(log: Log, **policy: int) -> ClusterSettings:
    return ClusterSettings(kafka=log.settings, snapshots=SnapshotSettings(**policy))


def test_the_writer_process_goes_on_from_the_snapshot_before(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "WORTH_A_SNAPSHOT", 0)
    log.grow(6)
    first = snapshot(cluster(log))
    state = log.grow(3)
    second = snapshot(cluster(log))
    assert (first.next_offset, second.next_offset) == (7, 10) == (7, state.next_offset)
    assert second.state_hash == state.state_hash() and second.kept_from == -1
    assert msgspec.json.decode(msgspec.json.encode(second), type=type(second)) == second


def test_old_entries_may_go_and_a_reader_needs_a_snapshot_then(log: Log) -> None:
    if log.settings.kind == "embedded":
        with pytest.raises(PlatformFaultError, match="cannot delete"):
            delete_ledger_below(log.settings, POOL, 3)
        return
    log.grow(8)
    snapshot(cluster(log, keep_entries=1))
    whole = log.grow(8)
    written = snapshot(cluster(log, keep_entries=1))
    assert written.kept_from == 8, "what the older snapshot needs, and one entry"
    with pytest.raises(LedgerTruncatedError, match="starts at offset 8"):
        LedgerView(cluster(log)).advance()
    view = LedgerView(cluster(log), from_snapshot=True)
    view.advance()
    assert view.state.state_hash() == whole.state_hash()
    found = newest_head(log.settings, POOL)
    assert found is not None
    for slot in (0, 1, 0, 1):
        spoil(log.settings, but(found[1], checksum="00"), slot)
    with pytest.raises(LedgerTruncatedError, match="checksum"):
        recover(log.settings, POOL)


def test_a_cluster_without_the_topic_has_no_snapshots(log: Log, tmp_path: Path) -> None:
    bare = replace(log.settings, prefix=log.settings.prefix + "no-such.")
    assert newest_head(bare, POOL) is None
    assert head_at(log.settings) == -1
