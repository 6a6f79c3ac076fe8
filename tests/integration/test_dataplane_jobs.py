"""Jobs and what belongs to them, on both kinds of broker: submissions, payloads, results, logs."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator

import msgspec
import pytest

from dataplane.commands import decode_command, send_command, send_command_sync
from dataplane.core.claimcheck import PayloadCorruptError, PayloadMissingError, location_of
from dataplane.dead_letter import fetch_original, read_dead_letters, write_dead_letter
from dataplane.logs import AttemptLog, read_logs
from dataplane.payloads import PayloadFetcher, put_payload
from dataplane.producer import RecordProducer
from dataplane.read import read_one, scan
from dataplane.results import read_result, result_bytes, write_result
from dataplane.submit import Submitted, Submitter
from idl.codec import JSON, MSGPACK, decode_spec, encode
from idl.errors import (
    BrokerUnavailableError,
    ConfigError,
    InvalidRecordError,
    JobFaultError,
)
from idl.ids import Attempt, JobId, QueueName
from idl.jobs import JobInput, JobSpec, PayloadLocation, SourceRef
from idl.limits import (
    LOG_BYTES_MAX,
    LOG_CHUNK_BYTES,
    PAYLOAD_BYTES_MAX,
    PAYLOAD_INLINE_BYTES_MAX,
    RESULT_BYTES_MAX,
    RESULT_INLINE_BYTES_MAX,
)
from idl.records import AttemptResult, AttemptStory, CancelJob, Command, DeadLetter, DrainNode
from idl.settings import KafkaSettings
from idl.topics import TopicNames
from idl.units import MIB

pytestmark = pytest.mark.kafka
QUEUE = QueueName("default")
SPEC = JobSpec(command=("true",))


@pytest.fixture
async def producer(broker_settings: KafkaSettings) -> AsyncIterator[RecordProducer]:
    found = RecordProducer(broker_settings)
    yield found
    await found.aclose()


@pytest.fixture
async def submitter(
    broker_settings: KafkaSettings, producer: RecordProducer
) -> AsyncIterator[Submitter]:
    numbers = itertools.count(1)
    yield Submitter(
        broker_settings,
        producer=producer,
        submitter="me",
        new_id=lambda: f"job-{next(numbers)}",
        now_ms=lambda: 1234,
    )


@pytest.fixture
async def fetcher(broker_settings: KafkaSettings) -> AsyncIterator[PayloadFetcher]:
    found = PayloadFetcher(broker_settings)
    yield found
    await found.aclose()


def _spec_at(settings: KafkaSettings, source: SourceRef) -> JobSpec:
    record = read_one(settings, source.topic, source.partition, source.offset)
    assert record is not None
    return decode_spec(record.value, record.content_type)


def _location(settings: KafkaSettings, submitted: Submitted) -> PayloadLocation:
    spec = _spec_at(settings, submitted.source)
    found = location_of(spec, submitted.source, TopicNames(settings.prefix).payloads)
    assert found is not None
    return found


# --- submit ---


async def test_a_job_is_named_dated_and_found(
    broker_settings: KafkaSettings, submitter: Submitter
) -> None:
    done = await submitter.submit(QUEUE, SPEC)
    assert done.job == "job-1"
    assert done.source.topic == f"{broker_settings.prefix}queue.default"
    expected = msgspec.structs.replace(SPEC, id="job-1", submitted_ms=1234, submitter="me")
    assert _spec_at(broker_settings, done.source) == expected
    record = read_one(broker_settings, *msgspec.structs.astuple(done.source))
    assert record is not None and (record.key, record.content_type) == (b"job-1", MSGPACK)


async def test_many_jobs_in_order(broker_settings: KafkaSettings, submitter: Submitter) -> None:
    done = await submitter.submit_many(QUEUE, (SPEC for _ in range(3_000)))
    assert [s.job for s in done] == [f"job-{i}" for i in range(1, 3_001)]
    assert len({s.source for s in done}) == 3_000
    found = {r.source: r.key for r in scan(broker_settings, done[0].source.topic)}
    assert found == {s.source: s.job.encode() for s in done}


async def test_jobs_that_share_an_input_send_it_once(
    broker_settings: KafkaSettings, submitter: Submitter
) -> None:
    shared, own = os.urandom(20_000), os.urandom(20_000)
    specs = [
        msgspec.structs.replace(
            SPEC, inputs={"shared": JobInput(data=shared), "n": JobInput(data=b"small")} | more
        )
        for more in ({}, {"own": JobInput(data=own, writable=True)}, {})
    ]
    done = await submitter.submit_many(QUEUE, specs)
    found = [_spec_at(broker_settings, one.source).inputs for one in done]
    refs = {inputs["shared"].ref for inputs in found}
    assert len(refs) == 1 and None not in refs
    assert all(inputs["n"] == JobInput(data=b"small") for inputs in found)
    assert found[1]["own"].writable and found[1]["own"].ref not in {None, *refs}
    topic = TopicNames(broker_settings.prefix).payloads
    assert [len(record.value or b"") for record in scan(broker_settings, topic)] == [20_000] * 2


def test_without_a_loop(embedded_settings: KafkaSettings) -> None:
    submitter = Submitter(embedded_settings)
    payload = os.urandom(PAYLOAD_INLINE_BYTES_MAX + 1)
    large = msgspec.structs.replace(SPEC, id="own-name", payload=payload)
    done = submitter.submit_many_sync(QUEUE, [SPEC, large])
    assert done[1].job == "own-name" and len(done[0].job) == 32
    fetcher = PayloadFetcher(embedded_settings)
    assert fetcher.fetch_sync(_location(embedded_settings, done[1])) == payload
    fetcher.close()
    submitter.close()
    submitter.close()


async def test_bad_specs_and_queues_are_refused_before_kafka(submitter: Submitter) -> None:
    with pytest.raises(InvalidRecordError, match="command is empty"):
        await submitter.submit(QUEUE, JobSpec(command=()))
    with pytest.raises(InvalidRecordError, match="object store"):
        spec = msgspec.structs.replace(SPEC, payload=bytes(PAYLOAD_BYTES_MAX + 1))
        await submitter.submit(QUEUE, spec)
    with pytest.raises(ConfigError, match=r"queue\.nowhere does not exist"):
        await submitter.submit(QueueName("nowhere"), SPEC)


async def test_unreachable_broker() -> None:
    producer = RecordProducer(
        KafkaSettings(bootstrap="127.0.0.1:1", client={"socket.timeout.ms": "1000"})
    )
    with pytest.raises(BrokerUnavailableError, match="outrider up"):
        await asyncio.to_thread(producer.require_topic, "x", 0.2)
    await producer.aclose(0.1)


async def test_any_client_may_submit(
    broker_settings: KafkaSettings, producer: RecordProducer
) -> None:
    """JSON or msgpack, with or without a content type: what another language would produce."""
    topic = TopicNames(broker_settings.prefix).queue(QUEUE)
    json = b'{"command": ["echo", "hi"], "payload": "aGk="}'
    for value, content_type in (
        (json, JSON), (json, ""), (encode(SPEC), MSGPACK), (encode(SPEC), ""),
    ):  # fmt: skip
        place = await producer.produce(topic, value, content_type=content_type)
        assert _spec_at(broker_settings, place).command in (("echo", "hi"), ("true",))
    place = await producer.produce(topic, b"<job/>", content_type="text/xml")
    with pytest.raises(InvalidRecordError, match="text/xml"):
        _spec_at(broker_settings, place)


# --- payloads ---


@pytest.mark.parametrize("size", [0, 1, PAYLOAD_INLINE_BYTES_MAX, PAYLOAD_INLINE_BYTES_MAX + 1,
                                  MIB, PAYLOAD_BYTES_MAX])  # fmt: skip
async def test_payload_there_and_back(
    broker_settings: KafkaSettings, submitter: Submitter, fetcher: PayloadFetcher, size: int
) -> None:
    data = os.urandom(size)
    done = await submitter.submit(QUEUE, msgspec.structs.replace(SPEC, payload=data))
    location = _location(broker_settings, done)
    assert location.inline == (size <= PAYLOAD_INLINE_BYTES_MAX)
    assert location.size_bytes == size
    assert await fetcher.fetch(location) == data


async def test_many_fetches_at_once(
    broker_settings: KafkaSettings, submitter: Submitter, fetcher: PayloadFetcher
) -> None:
    specs = [msgspec.structs.replace(SPEC, payload=b"%d" % i * 10) for i in range(200)]
    done = await submitter.submit_many(QUEUE, specs)
    places = [
        PayloadLocation(source=s.source, size_bytes=len(spec.payload or b""), inline=True)
        for s, spec in zip(done, specs, strict=True)
    ]
    found = await asyncio.gather(*(fetcher.fetch(place) for place in places))
    assert found == [spec.payload for spec in specs]


async def test_missing_and_corrupt_payloads_are_the_jobs_fault(
    broker_settings: KafkaSettings, producer: RecordProducer, fetcher: PayloadFetcher
) -> None:
    topic = TopicNames(broker_settings.prefix).payloads
    ref = await put_payload(producer, topic, "job", b"data")
    good = PayloadLocation(
        source=SourceRef(topic=topic, partition=ref.partition, offset=ref.offset),
        size_bytes=ref.size_bytes,
        inline=False,
        sha256=ref.sha256,
    )
    assert await fetcher.fetch(good) == b"data"
    replace = msgspec.structs.replace
    for bad in (replace(good, size_bytes=5), replace(good, sha256="0" * 64),
                replace(good, inline=True)):  # fmt: skip
        with pytest.raises(PayloadCorruptError, match="submit the job again"):
            await fetcher.fetch(bad)
    for offset in (ref.offset + 1, ref.offset + 1000):
        with pytest.raises(PayloadMissingError, match="submit the job again"):
            await fetcher.fetch(replace(good, source=replace(good.source, offset=offset)))
    assert await fetcher.fetch(good) == b"data", "a failure does not harm the next fetch"


async def test_fetch_from_an_unreachable_broker_is_retryable() -> None:
    fetcher = PayloadFetcher(KafkaSettings(bootstrap="127.0.0.1:1"))
    place = PayloadLocation(
        source=SourceRef(topic="x", partition=0, offset=0), size_bytes=1, inline=False
    )
    with pytest.raises(BrokerUnavailableError) as caught:
        await fetcher.fetch(place, timeout_s=0.2)
    assert caught.value.retryable
    await fetcher.aclose()


# --- results ---


@pytest.mark.parametrize("size", [None, 0, RESULT_INLINE_BYTES_MAX, RESULT_INLINE_BYTES_MAX + 1])
async def test_results(
    broker_settings: KafkaSettings,
    producer: RecordProducer,
    fetcher: PayloadFetcher,
    size: int | None,
) -> None:
    data = None if size is None else os.urandom(size)
    result = AttemptResult(
        job="j", attempt=1, node="n", term=3, outcome="succeeded", exit_code=0, result=data
    )
    place = await write_result(producer, broker_settings, result)
    found = await asyncio.to_thread(read_result, broker_settings, place)
    assert (found.result_ref is not None) == ((size or 0) > RESULT_INLINE_BYTES_MAX)
    assert await result_bytes(found, broker_settings, fetcher) == data
    assert msgspec.structs.replace(found, result=data, result_ref=None) == result


async def test_result_bounds(broker_settings: KafkaSettings, producer: RecordProducer) -> None:
    result = AttemptResult(job="j", attempt=1, node="n", term=3, outcome="succeeded",
                           result=bytes(RESULT_BYTES_MAX + 1))  # fmt: skip
    with pytest.raises(JobFaultError, match="object store"):
        await write_result(producer, broker_settings, result)
    nowhere = SourceRef(topic=TopicNames(broker_settings.prefix).results, partition=0, offset=9)
    with pytest.raises(JobFaultError, match="no longer keeps it"):
        await asyncio.to_thread(read_result, broker_settings, nowhere)


# --- logs ---


async def test_logs_of_one_job(broker_settings: KafkaSettings, producer: RecordProducer) -> None:
    one = AttemptLog(producer, broker_settings, JobId("one"), Attempt(1))
    two = AttemptLog(producer, broker_settings, JobId("two"), Attempt(1))
    again = AttemptLog(producer, broker_settings, JobId("one"), Attempt(2))
    assert one.first is None
    await two.write("stdout", b"other", 1)
    await one.write("stdout", b"a" * (LOG_CHUNK_BYTES + 1), 1)
    await one.write("stderr", b"b", 2)
    await again.write("stdout", b"second", 3)
    chunks = list(read_logs(broker_settings, JobId("one")))
    assert [(c.attempt, c.seq, c.stream, len(c.data)) for c in chunks] == [
        (1, 0, "stdout", LOG_CHUNK_BYTES), (1, 1, "stdout", 1), (1, 2, "stderr", 1),
        (2, 0, "stdout", 6),
    ]  # fmt: skip
    from_start = read_logs(broker_settings, JobId("one"), attempt=Attempt(2), start=again.first)
    assert [c.data for c in from_start] == [b"second"]
    assert list(read_logs(broker_settings, JobId("nobody"))) == []


async def test_logs_are_capped(broker_settings: KafkaSettings, producer: RecordProducer) -> None:
    log = AttemptLog(producer, broker_settings, JobId("j"), Attempt(1))
    await log.write("stdout", bytes(LOG_BYTES_MAX), 1)
    assert not log.truncated
    await log.write("stdout", b"x", 2)
    assert log.truncated
    found = sum(len(c.data) for c in read_logs(broker_settings, JobId("j")))
    assert found == LOG_BYTES_MAX


async def test_following_logs(broker_settings: KafkaSettings, producer: RecordProducer) -> None:
    log = AttemptLog(producer, broker_settings, JobId("j"), Attempt(1))
    await log.write("stdout", b"0", 1)
    seen: list[bytes] = []

    def follow() -> None:
        found = read_logs(broker_settings, JobId("j"), stop=lambda: len(seen) == 3)
        seen.extend(c.data for c in itertools.islice(found, 3))

    reading = asyncio.create_task(asyncio.to_thread(follow))
    await log.write("stdout", b"1", 1)
    await log.write("stdout", b"2", 1)
    await asyncio.wait_for(reading, 30)
    assert seen == [b"0", b"1", b"2"]


# --- dead letters and commands ---


async def test_dead_letter_and_its_replay(
    broker_settings: KafkaSettings, submitter: Submitter, producer: RecordProducer
) -> None:
    done = await submitter.submit(QUEUE, msgspec.structs.replace(SPEC, payload=b"in"))
    original, content_type = await asyncio.to_thread(fetch_original, broker_settings, done.source)
    letter = DeadLetter(
        key=done.job, queue=QUEUE, job=done.job, code="AttemptsExhausted", reason="3 of 3 failed",
        at_ms=1, source=done.source, original=original, content_type=content_type,
        attempts=(AttemptStory(attempt=1, node="n", outcome="failed", exit_code=1),),
    )  # fmt: skip
    place = await write_dead_letter(producer, broker_settings, letter)
    await write_dead_letter(producer, broker_settings, letter)
    assert list(read_dead_letters(broker_settings)) == [(place, letter)]
    later = msgspec.structs.replace(done.source, offset=done.source.offset + 1)
    reused = msgspec.structs.replace(letter, source=later, reason="a later job of this id")
    await write_dead_letter(producer, broker_settings, reused)
    assert [one.reason for _, one in read_dead_letters(broker_settings)] == [
        "3 of 3 failed", "a later job of this id",
    ]  # fmt: skip
    again = await submitter.replay(letter)
    assert again.job == "job-2"
    assert _spec_at(broker_settings, again.source).payload == b"in"
    with pytest.raises(InvalidRecordError, match="cannot be replayed"):
        await submitter.replay(msgspec.structs.replace(letter, original=None))
    gone = msgspec.structs.replace(done.source, offset=999)
    assert await asyncio.to_thread(fetch_original, broker_settings, gone) == (None, "")


async def test_large_dead_letter_leaves_the_original_where_it_is(
    broker_settings: KafkaSettings, producer: RecordProducer
) -> None:
    source = SourceRef(topic="t", partition=0, offset=0)
    letter = DeadLetter(key="k", queue="q", job="", code="invalid-spec", reason="r", at_ms=1,
                        source=source, original=bytes(10 * MIB))  # fmt: skip
    await write_dead_letter(producer, broker_settings, letter)
    ((_, found),) = read_dead_letters(broker_settings)
    assert found == msgspec.structs.replace(letter, original=None)


async def test_commands_keep_their_order(
    broker_settings: KafkaSettings, producer: RecordProducer
) -> None:
    sent: list[Command] = [
        CancelJob(job="j"),
        DrainNode(node="n"),
        DrainNode(node="n", drain=False),
    ]
    for command in sent[:2]:
        await send_command(producer, broker_settings, command, by="me", at_ms=5)
    send_command_sync(producer, broker_settings, sent[2], by="me", at_ms=5)
    found = list(scan(broker_settings, TopicNames(broker_settings.prefix).commands))
    decoded = [decode_command(record) for record in found]
    assert [d.command for d in decoded] == sent
    assert {(d.by, d.at_ms) for d in decoded} == {("me", 5)}
