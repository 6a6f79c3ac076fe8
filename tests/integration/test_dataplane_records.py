"""Producing, reading, tailing: the same suite on both kinds of broker."""

import asyncio
import os
import threading
from collections.abc import Callable
from functools import partial

import pytest

from dataplane.broker import Broker
from dataplane.producer import RecordProducer
from dataplane.read import read_one, read_range, scan, watermarks
from dataplane.tail import BEGINNING, END, KafkaRecord, Tail
from dataplane.topics import EMBEDDED_NOTE, ensure_topics, partition_counts
from idl.codec import JSON
from idl.errors import ConfigError, InvalidRecordError, PlatformFaultError
from idl.ids import PoolName, QueueName
from idl.jobs import SourceRef
from idl.limits import KAFKA_RECORD_BYTES_MAX, PAYLOAD_BYTES_MAX
from idl.settings import KafkaSettings
from idl.topics import TopicNames, TopicSettings
from tests.integration.conftest import create_topics, fresh_settings

pytestmark = pytest.mark.kafka


class Inbox:
    """Collects a tail's batches; waits for records without sleeping for a fixed time."""

    def __init__(self) -> None:
        self.records: list[KafkaRecord] = []
        self.errors: list[PlatformFaultError] = []
        self.stalls: list[tuple[bool, str]] = []
        self._news = asyncio.Event()

    def on_records(self, batch: list[KafkaRecord]) -> None:
        self.records += batch
        self._news.set()

    def has(self, count: int) -> bool:
        return len(self.records) >= count

    def on_error(self, error: PlatformFaultError) -> None:
        self.errors.append(error)
        self._news.set()

    def on_stall(self, stalled: bool, why: str) -> None:
        self.stalls.append((stalled, why))
        self._news.set()

    async def until(self, reached: Callable[[], bool], timeout_s: float = 30) -> None:
        async with asyncio.timeout(timeout_s):
            while not reached():
                assert not self.errors, self.errors
                self._news.clear()
                await self._news.wait()


def _tail(
    settings: KafkaSettings,
    start: dict[tuple[str, int], int],
    inbox: Inbox,
    unacknowledged_max: int = 1000,
) -> Tail:
    tail = Tail(
        settings,
        start,
        inbox.on_records,
        loop=asyncio.get_running_loop(),
        on_error=inbox.on_error,
        on_stall=inbox.on_stall,
        unacknowledged_max=unacknowledged_max,
    )
    tail.start()
    return tail


@pytest.fixture
def topic(broker_settings: KafkaSettings) -> str:
    """A topic with one order."""
    return TopicNames(broker_settings.prefix).commands


async def _fill(settings: KafkaSettings, topic: str, count: int, size: int = 0) -> None:
    producer = RecordProducer(settings)
    sent = [
        await producer.enqueue(topic, (b"%d|" % i).ljust(size, b"."), partition=0)
        for i in range(count)
    ]
    await asyncio.gather(*sent)
    await producer.aclose()


def _numbers(records: list[KafkaRecord]) -> list[int]:
    return [int((r.value or b"").split(b"|")[0]) for r in records]


# --- topics ---


def test_topics_are_created_once(make_settings: Callable[[], KafkaSettings]) -> None:
    settings = make_settings()
    table = TopicNames(settings.prefix).table(PoolName("p"), (QueueName("q"),), 3)
    lines: list[str] = []
    first = ensure_topics(settings, table, progress=lines.append)
    again = ensure_topics(settings, table)
    assert set(first.created) == {t.name for t in table} == set(again.existing)
    assert not again.created and len(lines) == 1
    counts = partition_counts(settings)
    assert counts[f"{settings.prefix}queue.q"] == 3
    assert counts[f"{settings.prefix}ledger.p"] == 1
    assert (EMBEDDED_NOTE in again.notes) == (settings.kind == "embedded")
    assert [n for n in again.notes if n != EMBEDDED_NOTE] == []


def test_settings_of_a_topic_are_brought_up_to_date(
    make_settings: Callable[[], KafkaSettings],
) -> None:
    settings = make_settings()
    name = f"{settings.prefix}logs"
    ensure_topics(settings, [TopicSettings(name=name, retention_ms=1_000_000)])
    report = ensure_topics(settings, [TopicSettings(name=name, retention_ms=2_000_000)])
    assert [n for n in report.notes if n != EMBEDDED_NOTE] == []


def test_ledger_with_two_partitions_is_refused(make_settings: Callable[[], KafkaSettings]) -> None:
    settings = make_settings()
    ledger = TopicNames(settings.prefix).ledger(PoolName("p"))
    ensure_topics(settings, [TopicSettings(name=f"{settings.prefix}queue.x", partitions=2)])
    report = ensure_topics(settings, [TopicSettings(name=f"{settings.prefix}queue.x")])
    assert any("has 2 partitions, not 1" in note for note in report.notes)
    with pytest.raises(ConfigError, match=r"must have 1 .*choose another kafka.prefix"):
        ensure_topics(settings, [TopicSettings(name=ledger, partitions=2)])
        ensure_topics(settings, [TopicSettings(name=ledger)])


def test_unreachable_broker_names_what_to_do() -> None:
    settings = KafkaSettings(bootstrap="127.0.0.1:1")
    with pytest.raises(PlatformFaultError, match="outrider up"):
        ensure_topics(settings, [TopicSettings(name="x")], timeout_s=0.3)


def test_settings_that_librdkafka_refuses_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"no\.such"):
        RecordProducer(KafkaSettings(client={"no.such": "x"}))


# --- produce and read ---


async def test_read_back_in_order(broker_settings: KafkaSettings, topic: str) -> None:
    producer = RecordProducer(broker_settings)
    places = [
        await producer.produce(topic, b"%d" % i, key=f"k{i}", content_type=JSON) for i in range(5)
    ]
    await producer.aclose()
    assert places == [SourceRef(topic=topic, partition=0, offset=i) for i in range(5)]
    found = list(read_range(broker_settings, topic, 0))
    assert [(r.offset, r.key, r.value, r.content_type) for r in found] == [
        (i, b"k%d" % i, b"%d" % i, JSON) for i in range(5)
    ]
    assert all(r.timestamp_ms > 0 for r in found)
    assert [r.offset for r in read_range(broker_settings, topic, 0, 2, 4)] == [2, 3]
    assert list(read_range(broker_settings, topic, 0, 5)) == []
    assert watermarks(broker_settings, topic) == {0: (0, 5)}


async def test_keys_keep_their_partition(broker_settings: KafkaSettings) -> None:
    queue = TopicNames(broker_settings.prefix).queue(QueueName("default"))
    producer = RecordProducer(broker_settings)
    places = [await producer.produce(queue, b"x", key=f"job{i % 8}") for i in range(32)]
    by_key: dict[int, set[int]] = {}
    for i, place in enumerate(places):
        by_key.setdefault(i % 8, set()).add(place.partition)
    assert all(len(partitions) == 1 for partitions in by_key.values())
    assert {p.partition for p in places} == {0, 1}
    assert len(list(scan(broker_settings, queue))) == 32
    producer.close()


async def test_scan_by_time(broker_settings: KafkaSettings, topic: str) -> None:
    await _fill(broker_settings, topic, 3)
    last = list(scan(broker_settings, topic))[-1].timestamp_ms
    assert [r.offset for r in scan(broker_settings, topic, until_ms=last + 1)] == [0, 1, 2]
    assert list(scan(broker_settings, topic, since_ms=last + 60_000)) == []


async def test_one_record_by_offset(broker_settings: KafkaSettings, topic: str) -> None:
    await _fill(broker_settings, topic, 3)
    found = read_one(broker_settings, topic, 0, 1)
    assert found is not None and found.value == b"1|"
    assert read_one(broker_settings, topic, 0, 3) is None
    assert read_one(broker_settings, topic, 7, 0) is None


@pytest.mark.parametrize("size", [1, 2**20, PAYLOAD_BYTES_MAX])
async def test_large_records(broker_settings: KafkaSettings, topic: str, size: int) -> None:
    data = os.urandom(size)
    producer = RecordProducer(broker_settings)
    place = await producer.produce(topic, data)
    await producer.aclose()
    found = read_one(broker_settings, topic, 0, place.offset)
    assert found is not None and found.value == data


async def test_many_large_records_in_one_read(broker_settings: KafkaSettings, topic: str) -> None:
    """A broker that answers past `fetch.max.bytes` must not make the client refuse the answer."""
    await _fill(broker_settings, topic, 24, 5 * 2**20)
    assert sum(1 for _ in read_range(broker_settings, topic, 0)) == 24


@pytest.mark.apache
async def test_a_damaged_record_stops_every_reader(apache_broker: Broker) -> None:
    """A byte that changed on the broker's disk: brokers send what is there, unseen."""
    settings = create_topics(fresh_settings(apache_broker))
    topic = TopicNames(settings.prefix).commands
    producer = RecordProducer(settings)
    for i in range(4):
        await producer.produce(topic, b"record %d" % i)  # a batch of its own
    await producer.aclose()
    [segment] = apache_broker.directory.glob(f"node-*/data/{topic}-0/*.log")
    with segment.open("r+b") as file:
        file.seek(segment.read_bytes().index(b"record 2"))
        file.write(b"R")
    found: list[bytes | None] = []
    with pytest.raises(PlatformFaultError, match=r"cannot be read .* restore the partition"):
        found.extend(r.value for r in read_range(settings, topic, 0))
    inbox = Inbox()
    tail = _tail(settings, {(topic, 0): 0}, inbox)
    await inbox.until(lambda: bool(inbox.errors))
    await tail.aclose()
    assert found == [r.value for r in inbox.records] == [b"record 0", b"record 1"]
    assert "cannot be read" in str(inbox.errors[0])


async def test_too_large_record_is_the_senders_fault(
    broker_settings: KafkaSettings, topic: str
) -> None:
    producer = RecordProducer(broker_settings)
    with pytest.raises(InvalidRecordError, match="send less"):
        await producer.produce(topic, bytes(KAFKA_RECORD_BYTES_MAX + 1))
    await producer.aclose()


async def test_unknown_topic_is_refused_not_created(broker_settings: KafkaSettings) -> None:
    name = f"{broker_settings.prefix}queue.unknown"
    producer = RecordProducer(broker_settings)
    with pytest.raises(ConfigError, match="does not exist"):
        await producer.produce(name, b"x")
    with pytest.raises(ConfigError, match="does not exist"):
        list(read_range(broker_settings, name, 0))
    assert name not in partition_counts(broker_settings)
    await producer.aclose()
    await producer.aclose()
    with pytest.raises(PlatformFaultError, match="closed"):
        producer.try_send(name, b"x")


def test_full_queue_blocks_and_loses_nothing(embedded_settings: KafkaSettings) -> None:
    """The local queue is smaller than what is sent: `send` waits, all arrive in order."""
    small = KafkaSettings(
        bootstrap=embedded_settings.bootstrap,
        kind="embedded",
        client={"queue.buffering.max.messages": "10"},
    )
    topic = TopicNames(embedded_settings.prefix).commands
    producer = RecordProducer(small)
    sent = [producer.send(topic, b"%d|" % i) for i in range(500)]
    assert [f.result(20).offset for f in sent] == list(range(500))
    producer.close()


# --- tail ---


async def test_tail_from_an_offset_and_on(broker_settings: KafkaSettings, topic: str) -> None:
    await _fill(broker_settings, topic, 10)
    inbox = Inbox()
    tail = _tail(broker_settings, {(topic, 0): 4}, inbox)
    await inbox.until(lambda: len(inbox.records) == 6)
    await _fill(broker_settings, topic, 3)
    await inbox.until(lambda: len(inbox.records) == 9)
    assert [r.offset for r in inbox.records] == list(range(4, 13))
    assert await tail.end_offsets() == {(topic, 0): 13}
    await tail.aclose()
    await tail.aclose()
    assert inbox.errors == [] and not tail.stalled


async def test_tail_from_beginning_and_end(broker_settings: KafkaSettings, topic: str) -> None:
    await _fill(broker_settings, topic, 3)
    first, last = Inbox(), Inbox()
    tails = [
        _tail(broker_settings, {(topic, 0): BEGINNING}, first),
        _tail(broker_settings, {(topic, 0): END}, last),
    ]
    await first.until(lambda: len(first.records) == 3)
    for _ in range(2):  # the second is answered after END was resolved
        await tails[1].end_offsets()
    await _fill(broker_settings, topic, 2)
    await last.until(lambda: len(last.records) == 2)
    assert [r.offset for r in last.records] == [3, 4]
    for tail in tails:
        await tail.aclose()


async def test_tail_stops_when_nobody_acknowledges(
    broker_settings: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataplane.tail.BLOCKED_S_MAX", 0.0)  # hold the partitions at once
    await _fill(broker_settings, topic, 500)
    inbox = Inbox()
    tail = _tail(broker_settings, {(topic, 0): 0}, inbox, unacknowledged_max=100)
    for expected in (100, 200, 300, 400, 500):
        await inbox.until(partial(inbox.has, expected))
        await tail.end_offsets()  # the tail went round its loop: nothing more came
        assert len(inbox.records) == expected
        tail.done(100)
    await tail.aclose()
    assert _numbers(inbox.records) == list(range(500))


async def test_paused_topic_waits_the_other_goes_on(
    broker_settings: KafkaSettings, topic: str
) -> None:
    other = TopicNames(broker_settings.prefix).dead_letter
    inbox = Inbox()
    tail = _tail(broker_settings, {(topic, 0): 0, (other, 0): 0}, inbox)
    tail.pause(topic)
    await tail.end_offsets()
    await _fill(broker_settings, topic, 5)
    await _fill(broker_settings, other, 5)
    await inbox.until(lambda: len(inbox.records) == 5)
    assert {r.topic for r in inbox.records} == {other}
    tail.resume(topic)
    await inbox.until(lambda: len(inbox.records) == 10)
    assert _numbers(inbox.records[5:]) == list(range(5))
    await tail.aclose()


async def test_seek_goes_back(broker_settings: KafkaSettings, topic: str) -> None:
    await _fill(broker_settings, topic, 5)
    inbox = Inbox()
    tail = _tail(broker_settings, {(topic, 0): 0}, inbox)
    await inbox.until(lambda: len(inbox.records) == 5)
    tail.seek(topic, 0, 3)
    await inbox.until(lambda: len(inbox.records) == 7)
    assert [r.offset for r in inbox.records] == [0, 1, 2, 3, 4, 3, 4]
    await tail.aclose()


async def test_offset_beyond_the_end_is_an_error(
    broker_settings: KafkaSettings, topic: str
) -> None:
    """The broker lost the records we had read (embedded: it restarted)."""
    await _fill(broker_settings, topic, 2)
    inbox = Inbox()
    tail = _tail(broker_settings, {(topic, 0): 50}, inbox)
    await inbox.until(lambda: bool(inbox.errors))
    assert "holds offsets 0 to 1 and we were at 50" in str(inbox.errors[0])
    await tail.aclose()
    with pytest.raises(PlatformFaultError, match="holds offsets 0 to 1, not 50"):
        list(read_range(broker_settings, topic, 0, 50))


async def test_closing_a_tail_of_an_unreachable_broker(tmp_path: object) -> None:
    inbox = Inbox()
    tail = _tail(KafkaSettings(bootstrap="127.0.0.1:1"), {("x", 0): 0}, inbox)
    await inbox.until(lambda: bool(inbox.stalls))
    assert inbox.stalls[0][0] and tail.stalled
    await tail.aclose()


def test_the_end_of_a_partition_that_never_rests_is_found(broker_settings: KafkaSettings) -> None:
    """A restarted coordinator asks for the ends of queues that services write all the time."""
    topic = TopicNames(broker_settings.prefix).commands
    producer, stop = RecordProducer(broker_settings, linger_ms=0), threading.Event()
    acked: list[int] = []

    def write() -> None:
        while not stop.wait(0.001):
            acked.append(producer.send(topic, b"x").result(30).offset)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            before = len(acked)
            (_, end) = watermarks(broker_settings, topic)[0]
            assert before <= end <= len(acked) + 1
    finally:
        stop.set()
        writer.join()
        producer.close()
