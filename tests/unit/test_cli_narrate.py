"""Every decision has a line, and the line says what matters."""

import typing

import pytest

from idl import ledger
from idl.ids import CoordinatorId
from idl.jobs import JobSpec, SourceRef
from idl.ledger import Capacity, Decision
from idl.members import CoordinatorPeer
from idl.records import AddMember, CancelJob, DrainNode, RemoveMember
from idl.units import GIB
from outrider.cli.narrate import narrate

C4 = CoordinatorPeer(name=CoordinatorId("c4"), dds_port=7416)
HERE = SourceRef(topic="queue.default", partition=0, offset=1)

LINES: list[tuple[Decision, str]] = [
    (ledger.TermStarted(pool="main", previous_term=1, why="c2 was silent"),
     "c1 leads pool main in term 2 (c2 was silent)"),
    (ledger.Ingested(queue="default", source=HERE, job=JobSpec(id="j", command=("echo", "x" * 90))),
     f"job j accepted into default: echo {'x' * 54}…"),
    (ledger.Rejected(queue="q", source=HERE, job="", code="empty", reason="no value"),
     "a record refused from q (empty): no value"),
    (ledger.NodeSeen(node="n1", incarnation=1, enforces=(), draining=True,
                     capacity=Capacity(cpu_millis=1500, memory_bytes=GIB, gpus=(0, 1))),
     "node n1 is here: 1.5 CPU, 1Gi, 2 GPUs, draining"),
    (ledger.NodeLost(node="n1", incarnation=1, reason="silent for 15s"),
     "node n1 is lost: silent for 15s"),
    (ledger.Assigned(job="j", attempt=2, node="n1", incarnation=1, gpus=(0, 3)),
     "job j attempt 2 placed on n1, GPUs 0, 3"),
    (ledger.Started(job="j", attempt=2), "job j attempt 2 runs"),
    (ledger.Released(job="j", attempt=2, outcome="failed", exit_code=3, detail="why"),
     "job j attempt 2 ended: failed, exit code 3: why"),
    (ledger.ResultRefused(job="j", attempt=1, source=HERE, reason="not current"),
     "a result of job j attempt 1 counts for nothing: not current"),
    (ledger.Finished(job="j", attempt=2), "job j finished with attempt 2"),
    (ledger.RetryScheduled(job="j", attempt=2, reason="failed", not_before_ms=3_000),
     "job j is tried again in 2s: failed"),
    (ledger.DeadLettered(job="j", code="AttemptsExhausted", reason="3 of 3"),
     "job j is dead (AttemptsExhausted): 3 of 3"),
    (ledger.DeadLetterStored(key="j"), "dead letter j stored"),
    (ledger.Cancelled(job="j", by="ops"), "job j cancelled by ops"),
    (ledger.Commanded(source=HERE, command=CancelJob(job="j"), by="ops"),
     "order by ops to cancel job j carried out"),
    (ledger.Commanded(source=HERE, command=DrainNode(node="n1", drain=False)),
     "order to use again node n1 carried out"),
    (ledger.Commanded(source=HERE, command=None, refused="unreadable"),
     "order to an unreadable command refused: unreadable"),
    (ledger.Commanded(source=HERE, command=AddMember(member=C4)),
     "order to add coordinator c4 carried out"),
    (ledger.Commanded(source=HERE, command=RemoveMember(name="c4"), by="ops"),
     "order by ops to remove coordinator c4 carried out"),
    (ledger.MembersChanged(version=1, members=(C4,), added="c4"),
     "membership 1: c4 added; coordinators are c4"),
    (ledger.LeaseAwaited(job="j", attempt=1, until_ms=4_000),
     "job j attempt 1 is given up; it is exclusive and its lease may last 3s more"),
    (ledger.LeadConfirmed(leases=2), "c1 still leads; 2 exclusive attempts keep their lease"),
    (ledger.Vacated(node="n1", incarnation=1, attempts=(("j", 1), ("k", 2))),
     "node n1 no longer holds j attempt 1, k attempt 2"),
    (ledger.Waiting(job="j", code="NoNodes", message="no node"), "job j waits (NoNodes): no node"),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "line"), LINES, ids=lambda value: type(value).__name__)
def test_a_decision_is_a_line(decision: Decision, line: str) -> None:
    assert narrate(decision, "c1", 2, 1_000) == line


def test_no_decision_is_without_words() -> None:
    assert {type(decision) for decision, _ in LINES} == set(typing.get_args(Decision))
