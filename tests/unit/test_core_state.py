"""The fold: job transitions, node accounting, positions, and what it refuses."""

import gc
from pathlib import Path

import pytest

from dataplane.core import state as state_module
from dataplane.core.due import SLACK
from dataplane.core.jobs import ENDED, TRANSITIONS, Cause, Job, Phase, describe_transitions
from dataplane.core.pending import PendingIndex, ShapeQueue
from idl import ledger as d
from idl.errors import InvariantBrokenError
from tests.unit.core_builders import Story, seen, source, spec

ROOT = Path(__file__).parents[2]


def test_the_page_of_job_states_is_in_step_with_the_table() -> None:
    assert (ROOT / "docs" / "job-states.md").read_text() == describe_transitions()


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("cause", list(Cause))
def test_transitions_are_the_table_and_nothing_else(phase: Phase, cause: Cause) -> None:
    job = Job(spec("a"), "default", source(0), None, 1, 0)
    job.phase = phase
    if (phase, cause) in TRANSITIONS:
        job.move(cause, 5)
        assert job.phase is TRANSITIONS[(phase, cause)]
    else:
        with pytest.raises(InvariantBrokenError) as broken:
            job.move(cause, 5)
        assert broken.value.story == ("0 Ingested",)


def test_nothing_leaves_a_final_phase() -> None:
    assert not [key for key in TRANSITIONS if key[0] in ENDED]


def test_a_story_is_bounded() -> None:
    job = Job(spec("a"), "default", source(0), None, 1, 0)
    for at_ms in range(100):
        job.move(Cause.ASSIGNED, at_ms)
        job.move(Cause.RELEASED, at_ms)
        job.move(Cause.RETRY_SCHEDULED, at_ms)
    assert len(job.told()) == 32 and job.told()[0] == "0 Ingested"


def test_a_job_from_ingestion_to_finish() -> None:
    story = Story().add(seen()).ingest(spec("a"))
    story.assign("a").start("a")
    node = story.state.nodes["n1"]
    assert node.free_cpu_millis == 1_000 and story.state.queues["default"].running == 1
    story.release("a", d.Finished(job="a", attempt=1))
    ended = story.state.ended["a"]
    assert (ended.phase, ended.node, ended.result) == (Phase.FINISHED, "n1", source(0, "results"))
    assert node.free_cpu_millis == 2_000 and not story.state.jobs
    assert story.state.positions == {("queue.default", 0): 1, ("results", 0): 1}


def test_the_garbage_collector_has_little_to_look_at() -> None:
    """A full collection stops a leader: what it keeps by the ten thousand takes no part in it."""
    story = Story().add(seen()).ingest(spec("a"), spec("b")).assign("a").start("a")
    story.release("a", d.Finished(job="a", attempt=1))
    story.ingest(spec("c"))
    assert not gc.is_tracked(story.state.ended["a"])
    b, c = story.state.jobs["b"], story.state.jobs["c"]
    assert not gc.is_tracked(b.spec) and b.shape is c.shape


def test_retry_backs_off_and_keeps_its_place() -> None:
    story = Story().add(seen()).ingest(spec("a"), spec("b")).assign("a")
    retry = d.RetryScheduled(job="a", attempt=2, reason="failed", not_before_ms=5_000)
    story.release("a", retry, "failed")
    state = story.state
    assert state.jobs["a"].phase is Phase.BACKING_OFF and "a" not in state.pending
    assert state.wake(4_999) == 0 and state.wake(5_000) == 1 and "a" in state.pending
    assert state.jobs["a"].rank < state.jobs["b"].rank
    story.assign("a")
    assert state.jobs["a"].attempt == 2 and "a" not in state.pending


def test_dead_letters_wait_until_they_are_stored() -> None:
    story = Story().ingest(spec("a"))
    story.add(
        d.DeadLettered(job="a", code="StartDeadlinePassed", reason="why"),
        d.Rejected(queue="default", source=source(1), job="x", code="empty", reason="no value"),
        d.Rejected(queue="default", source=source(2), job="a", code="duplicate", reason="twice"),
    )
    assert list(story.state.dead_letters_due) == ["a", "queue.default/0/1"]
    story.add(d.DeadLetterStored(key="a"), d.DeadLetterStored(key="queue.default/0/1"))
    assert not story.state.dead_letters_due


def test_a_lost_node_keeps_its_attempts_until_they_are_released() -> None:
    story = Story().add(seen(gpus=(0, 1))).ingest(spec("a", gpus=1)).assign("a", gpus=(1,))
    story.add(d.NodeLost(node="n1", incarnation=1, reason="silent"))
    assert list(story.state.orphaning) == ["n1"]
    dead = d.DeadLettered(job="a", code="NotRetried", reason="node_lost")
    story.add(d.Released(job="a", attempt=1, outcome="node_lost"), dead)
    assert not story.state.orphaning
    story.add(seen(gpus=(0, 1), incarnation=2))
    assert story.state.nodes["n1"].free_gpus == (0, 1)


def test_ended_jobs_are_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "ENDED_JOBS_KEPT", 2)
    story = Story().ingest(*(spec(name) for name in "abc"))
    story.add(*(d.Cancelled(job=name) for name in "abc"))
    assert list(story.state.ended) == ["b", "c"] and not story.state.is_known("a")


def test_lost_nodes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "LOST_NODES_KEPT", 2)
    story = Story()
    for name in ("n1", "n2", "n3"):
        story.add(seen(name), d.NodeLost(node=name, incarnation=1, reason="silent"))
    assert list(story.state.nodes) == ["n2", "n3"]


def test_void_entries_leave_no_trace() -> None:
    story = Story().add(seen()).ingest(spec("a"))
    before = story.state.state_hash()
    late = d.LedgerEntry(
        term=0, leader="old", incarnation=9, seq=4, at_ms=0, decisions=(d.Cancelled(job="a"),)
    )
    assert story.state.apply(99, late).reason == "older_term"
    assert story.state.state_hash() == before and story.state.void_counts == {"older_term": 1}


BROKEN: dict[str, d.Decision] = {
    "unknown job": d.Started(job="nobody", attempt=1),
    "attempt out of turn": d.Assigned(job="a", attempt=2, node="n1", incarnation=1),
    "unknown node": d.Assigned(job="a", attempt=1, node="n9", incarnation=1),
    "old incarnation": d.Assigned(job="a", attempt=1, node="n1", incarnation=7),
    "no room": d.Assigned(job="huge", attempt=1, node="n1", incarnation=1),
    "GPUs it did not ask": d.Assigned(job="a", attempt=1, node="n1", incarnation=1, gpus=(0,)),
    "position goes back": d.ResultRefused(job="", attempt=0, source=source(0), reason=""),
    "ingested twice": d.Ingested(queue="default", source=source(9), job=spec("a")),
    "finished while pending": d.Finished(job="a", attempt=0),
    "not current": d.Released(job="run", attempt=9, outcome="failed"),
    "no verdict": d.Released(job="run", attempt=1, outcome="failed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_valid_entry_that_contradicts_the_state_is_our_bug(case: str) -> None:
    story = Story().add(seen()).ingest(spec("a"), spec("huge", cpu=9_000), spec("run"))
    story.assign("run")
    with pytest.raises(InvariantBrokenError):
        story.add(BROKEN[case])


def test_pending_index_walks_in_order_and_survives_removal() -> None:
    index = PendingIndex()
    shape = Job(spec("a"), "q", source(0), None, 1, 0).shape
    for number in range(300):
        index.add(shape, (-(number % 3), number), f"j{number}")
    for number in range(0, 300, 2):
        index.remove(f"j{number}")
    index.add(shape, (0, 0), "j0")
    found = list(index.shapes[shape].in_order())
    assert found == sorted(found) and len(found) == 151 == len(index)
    assert index.ahead_of((0, 0)) == sum(entry[:2] < (0, 0) for entry in found)


def test_what_was_placed_is_not_walked_over_again() -> None:
    """A queue is emptied from its head: what a look at it costs must not grow with what went."""
    queue = ShapeQueue()
    for number in range(2_000):
        queue.add((0, number, f"j{number}"))
    for number in range(900):  # less than half: the heap is not made anew
        queue.remove(f"j{number}")
    assert len(queue.heap) == len(queue.members) == 1_100
    assert next(queue.in_order()) == (0, 900, "j900")


def test_a_reader_that_takes_nothing_out_keeps_no_times_of_jobs_that_moved_on() -> None:
    """A standby never asks what is due, and some deadlines are a month away."""
    story = Story().add(seen())
    for number in range(300):
        job = f"j{number}"
        story.ingest(spec(job, start_within_ms=2_000_000_000)).assign(job).start(job)
        retry = d.RetryScheduled(job=job, attempt=2, reason="x", not_before_ms=story.at_ms + 10)
        story.release(job, retry, "failed").assign(job).start(job)
        story.release(job, d.Finished(job=job, attempt=2))
    state = story.state
    assert len(state.deadlines) <= SLACK + 2 and len(state.backing_off) <= SLACK + 2
    waiting = [f"w{number:02}" for number in range(100)]
    story.ingest(*(spec(job, start_within_ms=1_000) for job in waiting))
    assert [job.id for job in state.overdue(story.at_ms + 1_000)] == waiting, "no live one goes"
