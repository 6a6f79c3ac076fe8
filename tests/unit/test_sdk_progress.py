"""A client's fold of one job, and a gate seeded from the last entries."""

import pytest

from dataplane.core.validity import TermGate
from idl.jobs import JobSpec, SourceRef
from idl.ledger import (
    Assigned,
    DeadLettered,
    Finished,
    Ingested,
    LedgerEntry,
    Rejected,
    Released,
    RetryScheduled,
    Started,
    TermStarted,
    Waiting,
)
from outrider.client.errors import JobFailedError, JobRejectedError
from outrider.client.follow import _seed
from outrider.client.progress import JobProgress, job_of

HERE = SourceRef(topic="queue.default", partition=0, offset=4)
RESULT = SourceRef(topic="results", partition=0, offset=9)


def ingested() -> Ingested:
    return Ingested(queue="default", source=HERE, job=JobSpec(id="j", command=("x",)))


def test_a_life_with_a_retry() -> None:
    progress = JobProgress("j")
    phases = []
    for decision in (
        ingested(),
        Waiting(job="j", code="NoNodes", message="no node"),
        Assigned(job="j", attempt=1, node="n1", incarnation=1),
        Started(job="j", attempt=1),
        Released(job="j", attempt=1, outcome="node_lost"),
        RetryScheduled(job="j", attempt=2, reason="node_lost", not_before_ms=5),
        Assigned(job="j", attempt=2, node="n2", incarnation=1),
        Released(job="j", attempt=2, outcome="succeeded", exit_code=0, source=RESULT),
        Finished(job="j", attempt=2),
    ):
        assert job_of(decision) == "j"
        progress.apply(7, decision)
        phases.append(str(progress.phase))
    assert phases == [
        "pending", "pending", "assigned", "running", "running", "backing_off", "assigned",
        "assigned", "finished",
    ]  # fmt: skip
    end = progress.ended.result(0)
    assert (end.succeeded, end.attempt, end.source) == (True, 2, RESULT)
    assert [story.node for story in end.attempts] == ["n1", "n2"]
    assert end.error() is None


def test_a_dead_job_tells_its_attempts() -> None:
    progress = JobProgress("j")
    progress.apply(1, ingested())
    progress.apply(2, Assigned(job="j", attempt=1, node="n1", incarnation=1))
    progress.apply(3, Released(job="j", attempt=1, outcome="failed", detail="d", exit_code=2))
    progress.apply(3, DeadLettered(job="j", code="AttemptsExhausted", reason=""))
    error = progress.ended.result(0).error()
    assert isinstance(error, JobFailedError)
    assert (error.outcome, error.exit_code, error.detail) == ("failed", 2, "d")
    assert "after 1 attempt: d" in str(error)


def test_only_the_rejection_of_ones_own_submission_counts() -> None:
    progress = JobProgress("j")
    progress.source = HERE
    progress.apply(1, ingested())
    other = SourceRef(topic="queue.default", partition=0, offset=5)
    progress.apply(
        2, Rejected(queue="default", source=other, job="j", code="duplicate", reason="known")
    )
    assert not progress.ended.done()
    found = JobProgress("j")  # of a submission that is not ours
    found.apply(2, Rejected(queue="default", source=other, job="j", code="no-queue", reason="x"))
    assert not found.ended.done() and found.refuse()
    with pytest.raises(JobRejectedError, match="no-queue"):
        found.ended.result(0)


def test_a_refused_duplicate_is_the_job_that_has_the_id() -> None:
    progress = JobProgress("j")
    progress.source = HERE
    progress.apply(
        2, Rejected(queue="default", source=HERE, job="j", code="duplicate", reason="known")
    )
    assert progress.taken and not progress.ended.done()
    progress.apply(3, Finished(job="j", attempt=1))
    assert progress.ended.result(0).succeeded


def entry(term: int, seq: int, leader: str = "c1") -> LedgerEntry:
    first = (TermStarted(pool="main", previous_term=term - 1),) if seq == 1 else ()
    return LedgerEntry(term=term, leader=leader, incarnation=term, seq=seq, at_ms=0,
                       decisions=first)  # fmt: skip


def test_a_gate_is_seeded_by_the_newest_term_that_was_really_started() -> None:
    gate = TermGate()
    assert _seed(gate, [entry(4, 8), entry(5, 1, "c2"), entry(4, 9), entry(5, 2, "c2")])
    assert (gate.term, gate.leader, gate.seq) == (5, "c2", 2)
    gate.next_offset = 100
    assert not gate.judge(100, entry(4, 10)).valid
    assert gate.judge(101, entry(5, 3, "c2")).valid
    assert gate.judge(102, entry(6, 1, "c3")).valid


def test_first_entries_alone_seed_nothing() -> None:
    assert not _seed(TermGate(), [entry(5, 1)])
    assert not _seed(TermGate(), [])
