"""Placement rules and explanations, as tables."""

import pytest

from controlplane.core.scheduler import Scheduler
from dataplane.core.explain import explain
from idl import ledger as d
from idl.limits import LEDGER_BATCH_DECISIONS_MAX
from tests.unit.core_builders import ALL_LIMITS, Story, seen, spec


def places(story: Story, limit: int = LEDGER_BATCH_DECISIONS_MAX) -> list[tuple[str, str]]:
    return [(p.job, p.node) for p in Scheduler().plan(story.state, limit)]


def test_priority_first_then_submission_order() -> None:
    story = Story().add(seen(cpu=3_000))
    story.ingest(spec("a"), spec("b", priority=1), spec("c"), spec("d", cpu=500, priority=1))
    assert [job for job, _ in places(story)] == ["b", "d", "a"]


def test_what_fits_nowhere_is_passed_by() -> None:
    story = Story().add(seen()).ingest(spec("big", cpu=64_000, priority=9), spec("small"))
    assert places(story) == [("small", "n1")]


def test_cpu_jobs_spread_to_the_freest_node_and_ties_go_by_name() -> None:
    story = Story().add(seen("n2", cpu=4_000), seen("n1", cpu=4_000), seen("n3", cpu=2_000))
    story.ingest(*(spec(f"j{n}") for n in range(5)))
    assert [node for _, node in places(story)] == ["n1", "n2", "n3", "n1", "n2"]


def test_memory_counts_in_the_free_share() -> None:
    story = Story().add(seen("n1", memory=2**29), seen("n2", memory=2**33))
    story.ingest(spec("a"), spec("b"))
    assert [node for _, node in places(story)] == ["n1", "n2"]


def test_gpu_jobs_pack_and_take_the_lowest_indices() -> None:
    story = Story().add(
        seen("n1", cpu=8_000, gpus=(0, 1, 2, 3)), seen("n2", cpu=8_000, gpus=(4, 5))
    )
    story.ingest(*(spec(f"j{n}", gpus=1) for n in range(3)), spec("wide", gpus=3))
    plan = Scheduler().plan(story.state, 10)
    assert [(p.node, p.gpus) for p in plan] == [
        ("n2", (4,)), ("n2", (5,)), ("n1", (0,)), ("n1", (1, 2, 3)),
    ]  # fmt: skip


def test_only_nodes_that_match_and_take_work() -> None:
    no_seccomp = tuple(limit for limit in ALL_LIMITS if limit != "seccomp")
    story = Story().add(
        seen("n1", draining=True),
        seen("n2", enforces=no_seccomp, labels={"zone": "a"}),
        seen("n3", labels={"zone": "b"}),
        seen("n4", labels={"zone": "a"}),
        seen("n5", labels={"zone": "a"}),
        d.NodeLost(node="n5", incarnation=1, reason="silent"),
    )
    story.ingest(spec("a", node_labels={"zone": "a"}))
    assert places(story) == [("a", "n4")]


def test_a_job_goes_where_its_image_is_and_a_node_that_gains_it_is_told_of() -> None:
    story = Story().add(seen("n1"), seen("n2", images={"alpine": "sha256:1", "b": "directory"}))
    story.ingest(spec("a", image="alpine"), spec("c", image="c"), spec("plain"))
    assert sorted(places(story)) == [("a", "n2"), ("plain", "n1")]
    told = explain(story.state, "c", 0)
    assert told.code == "NoMatchingNode" and told.message == "no node offers image c"
    assert {reason.why for reason in told.nodes} == {"does not offer image c"}
    story.add(seen("n1", images={"c": "directory"}))
    assert ("c", "n1") in places(story)


def test_room_that_the_same_entry_frees_counts_and_closed_nodes_do_not() -> None:
    story = Story().add(seen(cpu=1_000)).ingest(spec("a"), spec("b")).assign("a")
    held = story.state.nodes["n1"].attempts["a"]
    scheduler = Scheduler()
    assert scheduler.plan(story.state, 10) == []
    (placed,) = scheduler.plan(story.state, 10, freed={"n1": [held]})
    assert placed.job == "b"
    assert scheduler.plan(story.state, 10, freed={"n1": [held]}, closed={"n1"}) == []
    assert scheduler.plan(story.state, 10, excluded={"b"}, freed={"n1": [held]}) == []


def test_a_blocked_shape_is_looked_at_again_when_room_returns() -> None:
    story = Story().add(seen(cpu=1_000)).ingest(spec("a"), spec("b")).assign("a")
    scheduler = Scheduler()
    assert scheduler.plan(story.state, 10) == [] == scheduler.plan(story.state, 10)
    story.release("a", d.Finished(job="a", attempt=1))
    assert [p.job for p in scheduler.plan(story.state, 10)] == ["b"]


def test_a_plan_that_came_to_nothing_leaves_no_memory_behind() -> None:
    """Its entry was void, for another led by then; who leads again finds the room still there."""
    story, scheduler = Story().add(seen(cpu=1_000)).ingest(spec("a"), spec("b")), Scheduler()
    assert [p.job for p in scheduler.plan(story.state, 10)] == ["a"]
    for term in (2, 3):
        began = d.LedgerEntry(
            term=term, leader="c1", incarnation=term, seq=1, at_ms=story.at_ms,
            decisions=(d.TermStarted(pool="main", previous_term=term - 1),),
        )  # fmt: skip
        assert story.state.apply(story.state.next_offset, began).valid
    assert [p.job for p in scheduler.plan(story.state, 10)] == ["a"]


def test_the_limit_is_kept() -> None:
    story = Story().add(seen(cpu=9_000)).ingest(*(spec(f"j{n}") for n in range(5)))
    assert len(places(story, 2)) == 2 and places(story, 0) == []


EXPLAINED = [
    ({}, (), "NoNodes", "start an agent"),
    ({"gpus": 2}, (seen(gpus=(0,)),), "NoMatchingNode", "no node offers 2 GPUs"),
    ({"cpu": 9_000}, (seen(),), "NoMatchingNode", "no node offers 9 CPUs"),
    ({"memory": 2**40}, (seen(),), "NoMatchingNode", "1Ti of memory"),
    ({"node_labels": {"zone": "a"}}, (seen(),), "NoMatchingNode", "label zone=a"),
    ({"image": "a"}, (seen(images={"b": ""}),), "NoMatchingNode", "no node offers image a"),
    (
        {}, (seen(enforces=("memory", "pids", "cpu", "network", "filesystem", "disk",
                            "wall_time")),),
        "NoMatchingNode", "enforcement of seccomp",
    ),
    (
        {"gpus": 1, "cpu": 4_000}, (seen("n1", gpus=(0,)), seen("n2", cpu=8_000)),
        "NoMatchingNode", "no single node offers all of: 4 CPUs, 1 GPUs",
    ),
    ({}, (seen(draining=True),), "NoMatchingNode", "every node is draining"),
    ({}, (seen(),), "Ready", "placed in its turn"),
]  # fmt: skip


@pytest.mark.parametrize(("asks", "nodes", "code", "words"), EXPLAINED)
def test_explanations_of_pending(
    asks: dict[str, object], nodes: tuple[d.NodeSeen, ...], code: str, words: str
) -> None:
    story = Story().add(*nodes).ingest(spec("a", **asks))
    found = explain(story.state, "a", story.at_ms)
    assert (found.code, found.position) == (code, 1)
    assert words in found.message


def test_explanations_along_a_life() -> None:
    story = Story().add(seen("n1", cpu=1_000), seen("n2", cpu=500)).ingest(spec("a"), spec("b"))

    def code(job: str = "a") -> str:
        return explain(story.state, job, story.at_ms).code

    story.assign("a")
    assert code() == "Assigned"
    waiting = explain(story.state, "b", story.at_ms)
    assert waiting.code == "WaitingForResources"
    assert [reason.why for reason in waiting.nodes] == [
        "in use by others: cpu", "does not offer 1 CPUs",
    ]  # fmt: skip
    story.start("a")
    assert code() == "Running"
    retry = d.RetryScheduled(job="a", attempt=2, reason="x", not_before_ms=story.at_ms + 9_000)
    story.release("a", retry, "failed")
    assert code() == "BackingOff"
    story.assign("a").release("a", d.Finished(job="a", attempt=2))
    assert code() == "Finished"
    story.add(d.Cancelled(job="b", by="me"))
    assert code("b") == "Cancelled" and code("c") == "Unknown"
