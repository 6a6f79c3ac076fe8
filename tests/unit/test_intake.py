"""From a queue's bytes to the core: whatever a submitter sends is told, and hurts nobody else."""

import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from controlplane.core.events import SubmissionsRead
from controlplane.intake import Intake, IntakeEvent, submission_of
from dataplane.core.claimcheck import PayloadCorruptError, verify
from dataplane.tail import KafkaRecord, Tail
from idl.codec import (
    JSON,
    MSGPACK,
    decode,
    decode_body,
    decode_spec,
    encode_body,
    encode_json,
)
from idl.control import NodeReport
from idl.errors import InvalidRecordError, PlatformFaultError
from idl.ids import QueueName
from idl.jobs import JobSpec, PayloadLocation, PayloadRef
from idl.ledger import Ingested, Rejected
from idl.records import AttemptResult
from idl.settings import KafkaSettings
from tests.unit.core_builders import Hand, report_of, seen, source, spec

QUEUE = QueueName("default")
TOPIC = "queue.default"
DEEP = 100_000
HUGE = 10**30


def record(offset: int, value: bytes) -> KafkaRecord:
    return KafkaRecord(TOPIC, 0, offset, None, value, JSON, 1)


def good(job: str, **more: Any) -> bytes:
    return json.dumps({"command": ["true"], "id": job} | more).encode()


def nested(deep: int) -> bytes:
    return b'{"command":["true"],"x":' + b"[" * deep + b"]" * deep + b"}"


class Taken:
    """A tail that counts what was dealt with."""

    def __init__(self) -> None:
        self.count = 0

    def done(self, count: int) -> None:
        self.count += count


def test_poison_between_submissions_is_refused_and_costs_nobody_else_anything() -> None:
    hand = Hand()

    def deliver(events: list[IntakeEvent]) -> None:
        for event in events:
            hand.step(event)
        hand.settle()

    intake = Intake(KafkaSettings(), ((TOPIC, 0),), deliver, lambda error: None)
    tail: Any = Taken()
    intake._tail, intake._term = tail, 1
    poison = [
        nested(DEEP),
        good("huge", submitted_ms=HUGE),
        good("huge", priority=HUGE),
        json.dumps({"v": HUGE, "command": ["true"]}).encode(),
        good("huge", payload_ref=PLACE | {"partition": HUGE}),
        good("far", payload_ref=PLACE | {"partition": 2**40}),
        good("long", name="x" * 60_000),
    ]
    records = [record(0, good("first"))]
    records += [record(1 + at, value) for at, value in enumerate(poison)]
    records.append(record(1 + len(poison), good("last")))
    intake._read(tail, records)
    assert set(hand.state.jobs) == {"first", "last"}
    assert hand.state.queues["default"].rejected == len(poison)
    assert hand.state.positions[TOPIC, 0] == len(records) == tail.count


PLACE = {"partition": 0, "offset": 0, "size_bytes": 1, "sha256": "ab"}


def test_every_number_of_a_spec_that_is_too_large_is_refused_or_can_be_decided_on() -> None:
    """Found by walking over the types, so that a new field is not forgotten."""
    paths = list(numbers(JobSpec, ()))
    assert ("submitted_ms",) in paths and ("payload_ref", "partition") in paths
    for path in paths:
        for value in (HUGE, -HUGE, 2**63, 2**64 - 1, -(2**63), -1):
            wrong: dict[str, Any] = {"command": ["true"], "id": "a"}
            at = wrong
            for step in path[:-1]:
                at = at.setdefault(step, dict(PLACE) if step in ("payload_ref", "ref") else {})
            at[path[-1]] = value
            if "f" in wrong.get("inputs", {}):
                wrong["inputs"]["f"]["ref"].setdefault("sha256", "ab")
            read = submission_of(record(0, json.dumps(wrong).encode()), QUEUE, "payloads")
            hand = Hand()
            hand.step(SubmissionsRead(term=1, submissions=(read,)))
            (decision,) = hand.settle()
            assert isinstance(decision, Ingested | Rejected), (path, value)


def numbers(kind: Any, path: tuple[str, ...]) -> Any:
    """Paths of all integers in a Struct."""
    for field in msgspec.structs.fields(kind):
        here = (*path, field.encode_name)
        text = str(field.type)
        if field.type is int:
            yield here
        elif "JobInput" in text:
            for name in ("partition", "offset", "size_bytes"):
                yield (*here, "f", "ref", name)
        elif "PayloadRef" in text:
            yield from numbers(PayloadRef, here)
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from numbers(field.type, here)


@pytest.mark.parametrize("kind", [JSON, MSGPACK])
def test_what_is_nested_too_deeply_is_an_invalid_record(kind: str) -> None:
    deep = nested(DEEP)
    if kind == MSGPACK:
        deep = b"\x82\xa7command\x91\xa1x\xa1x" + b"\x91" * DEEP + b"\xc0"
    with pytest.raises(InvalidRecordError) as caught:
        decode_spec(deep, kind)
    assert caught.value.code == "out-of-range"
    with pytest.raises(InvalidRecordError):
        decode(deep, AttemptResult)


def test_a_result_with_a_number_that_the_ledger_cannot_hold_is_refused() -> None:
    told = json.loads(
        encode_json(AttemptResult(job="a", attempt=1, node="n", term=1, outcome="failed"))
    )
    with pytest.raises(InvalidRecordError, match="64 bits"):
        decode(json.dumps(told | {"exit_code": HUGE}).encode(), AttemptResult)


def test_a_submission_waits_without_its_payload() -> None:
    data = b"x" * 10_000
    read = submission_of(record(7, encode_json(spec("a", payload=data))), QUEUE, "payloads")
    assert read.spec is not None and read.spec.payload is None
    assert read.payload is not None and (read.payload.size_bytes, read.payload.inline) == (
        len(data), True,
    )  # fmt: skip


def test_a_bug_in_what_takes_records_in_ends_the_reading_and_passes_nothing() -> None:
    told: list[PlatformFaultError] = []
    taken: list[int] = []

    def take(records: list[KafkaRecord]) -> None:
        if records[0].offset == 1:
            raise RuntimeError("a bug")
        taken.append(records[0].offset)

    tail = Tail(KafkaSettings(), {(TOPIC, 0): 0}, take, on_error=told.append, name="intake")
    for offset in range(3):
        tail._take([record(offset, b"x")])
    assert taken == [0], "nothing behind the bug is taken as if nothing was lost"
    (error,) = told
    assert "queue.default[0]@1" in str(error) and "a bug" in str(error)


def test_a_control_message_with_a_number_that_the_ledger_cannot_hold_is_refused() -> None:
    told = json.loads(encode_body(report_of(seen())))
    assert decode_body(json.dumps(told), NodeReport)
    for field in ("incarnation", "cpu_millis"):
        wrong = json.loads(json.dumps(told))
        (wrong if field in wrong else wrong["capacity"])[field] = HUGE
        with pytest.raises(InvalidRecordError):
            decode_body(json.dumps(wrong), NodeReport)


def test_a_claim_check_without_its_digest_is_refused() -> None:
    """The place of somebody's payload can be guessed, its digest cannot."""
    with pytest.raises(InvalidRecordError, match="sha256 is missing"):
        decode_spec(good("a", payload_ref=PLACE | {"sha256": ""}), JSON)
    place = PayloadLocation(source=source(0, "payloads"), size_bytes=6, inline=False)
    with pytest.raises(PayloadCorruptError):  # of a spec that is in the ledger already
        verify(b"secret", place)
    with pytest.raises(PayloadCorruptError) as caught:
        verify(b"secret", replace(place, size_bytes=0))
    assert "6" not in str(caught.value), "nor how long it is"
