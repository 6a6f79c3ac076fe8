"""Following jobs without Kafka: how often the ledger is read, and who is told what."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.core.validity import TermGate
from idl.errors import PlatformFaultError
from idl.jobs import JobSpec, SourceRef
from idl.ledger import (
    Assigned,
    Decision,
    Ingested,
    LedgerEntry,
    Rejected,
    Released,
    TermStarted,
)
from outrider.client import follow
from outrider.client.errors import JobRejectedError
from outrider.client.follow import Follower

Ledger = list[tuple[int, LedgerEntry]]


def place(offset: int) -> SourceRef:
    return SourceRef(topic="q", partition=0, offset=offset)


def entry(
    offset: int, *decisions: Decision, term: int = 1, seq: int = 0
) -> tuple[int, LedgerEntry]:
    return offset, LedgerEntry(
        term=term, leader="c1", incarnation=1, seq=seq or offset + 1, at_ms=1, decisions=decisions
    )


def ingested(job: str, offset: int) -> Ingested:
    return Ingested(queue="q", source=place(offset), job=JobSpec(id=job, command=("x",)))


def refused(job: str, offset: int) -> Rejected:
    return Rejected(queue="q", source=place(offset), job=job, code="duplicate", reason="taken")


class Kafka:
    """The ledger, and how often it was read."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.reads = ledger, 0
        self.during: Any = lambda: None

    def read(self, _kafka: object, _pool: object, start: int = 0, end: int | None = None) -> Ledger:
        self.reads += 1
        self.during()
        if start < self.ledger[0][0]:
            raise PlatformFaultError("the ledger's beginning is gone")
        return [(at, one) for at, one in self.ledger if at >= start and (end is None or at < end)]


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    made = Kafka([entry(0, TermStarted(pool="p", previous_term=0))])
    monkeypatch.setattr(follow, "read_ledger", made.read)
    monkeypatch.setattr(follow, "watermarks", lambda *_: {0: (made.ledger[0][0], 0)})
    monkeypatch.setattr(follow, "ledger_end", lambda *_: 0)
    monkeypatch.setattr(follow, "seed_gate", lambda *_: TermGate())
    reader = SimpleNamespace(start=lambda: None, done=lambda _count: None, close=lambda: None)
    monkeypatch.setattr(follow, "LedgerReader", lambda *_, **__: reader)
    return made


def follower() -> Follower:
    return Follower(SimpleNamespace(kafka=SimpleNamespace(prefix=""), pool="p"))  # type: ignore[arg-type]


def test_one_reading_of_the_ledger_finds_the_jobs_of_a_whole_batch(kafka: Kafka) -> None:
    names = [f"j{number}" for number in range(50)]
    kafka.ledger += [
        entry(1, *(ingested(name, at) for at, name in enumerate(names))),
        entry(2, *(refused(name, 1000 + at) for at, name in enumerate(names))),
    ]
    made = follower()
    watched = [made.watch(name) for name in names]
    made._read(kafka.ledger)  # the refusals are read before the produce returns
    made.begin(zip(watched, (place(1000 + at) for at in range(50)), strict=True))
    assert kafka.reads == 1
    assert {str(one.phase) for one in watched} == {"pending"}
    kafka.ledger.append(entry(3, refused("j0", 5000)))
    made._read(kafka.ledger[3:])
    assert kafka.reads == 1, "nobody is looked for twice"


def test_a_job_is_looked_for_once_whoever_asks(kafka: Kafka) -> None:
    kafka.ledger += [
        entry(
            1, ingested("j", 0), Assigned(job="j", attempt=1, node="n", incarnation=1),
            Released(job="j", attempt=1, outcome="failed"),
        ),
        entry(2, refused("j", 1000)),
    ]  # fmt: skip
    made = follower()
    watched = made.watch("j")
    made._read(kafka.ledger)
    late = entry(3, refused("j", 2000))
    kafka.during = lambda: threading.Thread(target=made._read, args=([late],)).start()
    made.begin([(watched, place(1000))])
    assert [story.attempt for story in watched.attempts] == [1]


def test_a_ledger_whose_beginning_is_gone_is_read_as_far_back_as_it_goes(kafka: Kafka) -> None:
    kafka.ledger = [
        entry(5000, refused("other", 1), term=7, seq=40),
        entry(5001, Assigned(job="j", attempt=1, node="n", incarnation=1), term=7, seq=41),
        entry(5002, refused("j", 1000), refused("old", 1001), term=7, seq=42),
    ]
    made = follower()
    made._gate.term, made._gate.leader, made._gate.incarnation, made._gate.seq = 7, "c1", 1, 39
    known, old = made.watch("j"), made.watch("old")
    made._read(kafka.ledger)
    made.begin([(known, place(1000)), (old, place(1001))])
    assert str(known.phase) == "assigned" and not known.ended.done()
    with pytest.raises(JobRejectedError, match="duplicate"):
        old.ended.result(0)


def test_a_future_that_its_holder_cancelled_keeps_nobody_from_hearing_of_a_failure(
    kafka: Kafka,
) -> None:
    made = follower()
    watched = [made.watch(f"j{number}") for number in range(3)]
    made.begin((one, place(at)) for at, one in enumerate(watched))
    watched[0].ended.cancel()
    made._fail(PlatformFaultError("the topic is gone"))
    assert [one.ended.done() for one in watched] == [True] * 3
    assert made.watch("later").ended.exception(0) is not None


def test_a_tail_that_fails_while_the_past_is_read_is_the_jobs_failure_alone(kafka: Kafka) -> None:
    kafka.ledger += [entry(1, ingested("j", 0)), entry(2, refused("j", 1000))]
    made = follower()
    watched = made.watch("j")
    made._read(kafka.ledger)

    def fail() -> None:
        made._fail(PlatformFaultError("tail"))
        raise PlatformFaultError("past")

    kafka.during = fail
    made.begin([(watched, place(1000))])
    assert isinstance(watched.ended.exception(0), PlatformFaultError)


def test_two_threads_that_ask_for_a_job_that_nobody_knows_are_both_told(kafka: Kafka) -> None:
    made = follower()
    found: list[object] = []

    def another() -> None:
        kafka.during = lambda: None
        found.append(made.recall("j"))

    kafka.during = another
    found.append(made.recall("j"))
    assert found == [None, None] and not made._jobs
