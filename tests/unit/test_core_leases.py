"""Exclusive jobs as a leader treats them: leases granted, counted, waited for. One rule a test."""

import pytest

from controlplane.core import events as e
from controlplane.core.bounds import LEASE_KILL_MS, LEASE_RENEWALS
from controlplane.core.leases import margin_ms
from idl import ledger as d
from idl.control import AssignIntent, Lease, RenewIntent
from idl.errors import InvariantBrokenError
from tests.unit.core_builders import (
    RETRY_FAST,
    STAMPS_BEHIND_MS,
    TIMING,
    Hand,
    Story,
    names,
    report_of,
    seen,
    spec,
)

LEASE_MS = TIMING.exclusive_lease_ms
OVER_MS = LEASE_MS + margin_ms(LEASE_MS)


def leases(hand: Hand) -> list[Lease]:
    """Of the assigns and renewals sent since the last look."""
    found = (x.lease for x in hand.intents() if isinstance(x, AssignIntent | RenewIntent))
    return [lease for lease in found if lease is not None]


def running(**more: object) -> Hand:
    """A leader, node n1, exclusive job a running on it as attempt 1."""
    hand = Hand()
    hand.node()
    hand.status("n1")
    hand.submit(spec("a", exclusive=True, retry=RETRY_FAST, **more))
    hand.status("n1", ("a", 1, "running"))
    hand.out.clear()
    return hand


def speak(hand: Hand, ms: int, *views: tuple[str, int, str]) -> None:
    """Time passes and n1 says what it has."""
    for _ in range(ms // 250):
        hand.pass_ms(250)
        hand.status("n1", *views)


def test_an_assign_carries_a_lease_that_began_with_the_nodes_stamp() -> None:
    hand = Hand()
    hand.node()
    hand.status("n1")
    hand.pass_ms(100)
    hand.submit(spec("a", exclusive=True))
    heard_ms = hand.now - 100
    assert leases(hand) == [Lease(since_ms=heard_ms - STAMPS_BEHIND_MS, length_ms=LEASE_MS)]


def test_nothing_is_assigned_upon_a_stamp_that_no_entry_followed() -> None:
    hand = Hand()
    hand.node()
    hand.submit(spec("a", exclusive=True))
    assert hand.state.jobs["a"].node == "n1"
    assert hand.intents() == []
    hand.status("n1")
    assert hand.intents() == []
    hand.pass_ms(TIMING.resend_ms + 200, 100)  # LeadConfirmed, and the next time of telling
    assert len(leases(hand)) >= 1


def test_a_lease_is_renewed_upon_a_later_stamp_once_the_ledger_confirmed_the_leader() -> None:
    hand = running()
    speak(hand, LEASE_MS // LEASE_RENEWALS + 500, ("a", 1, "running"))
    (renewed,) = leases(hand)
    assert renewed.since_ms > hand.now - STAMPS_BEHIND_MS - 1_000


def test_a_leader_that_cannot_read_its_entries_back_renews_nothing() -> None:
    hand = running()
    for _ in range(4 * LEASE_MS // 250):
        hand.now += 250
        hand.step(e.Tick())  # what it appends is never read back
        hand.step(e.StatusReported(status=hand.status_of("n1", ("a", 1, "running"))))
    entry = hand.appended()
    assert entry is not None and isinstance(entry.decisions[0], d.LeadConfirmed)
    assert leases(hand) == []


def test_an_exclusive_attempt_of_a_lost_node_is_released_only_after_its_lease() -> None:
    hand = running()
    heard_ms = hand.now
    hand.pass_ms(TIMING.lost_ms + 250, 250)
    job = hand.state.jobs["a"]
    assert hand.state.nodes["n1"].lost
    assert job.lease_awaited == (1, heard_ms + OVER_MS)
    hand.pass_ms(OVER_MS - TIMING.lost_ms - 500, 250)
    assert (job.node, job.attempt) == ("n1", 1)
    hand.node(seen("n2"))
    hand.status("n2")
    hand.pass_ms(500, 250)
    assert (job.node, job.attempt) == ("n2", 2)
    assert names(hand.result("a", attempt=1, node="n1")) == ["ResultRefused"]


def test_a_forgotten_exclusive_attempt_waits_for_its_lease_too() -> None:
    hand = running()
    heard_ms = hand.now
    while not hand.state.jobs["a"].attempts:
        speak(hand, 250)
        assert hand.now < heard_ms + 4 * OVER_MS
    assert hand.now >= heard_ms + OVER_MS
    assert hand.state.jobs["a"].attempts[0].detail == "node forgot attempt"


def test_a_new_leader_counts_a_whole_lease_from_its_own_first_entry() -> None:
    hand = running()
    hand.step(e.RoleLost(reason="test"))
    hand.now += 2 * OVER_MS
    hand.step(e.RoleWon(term=2))
    hand.settle()
    began_ms = hand.now
    hand.pass_ms(TIMING.lost_ms + 500, 250)
    assert hand.state.jobs["a"].lease_awaited == (2, began_ms + OVER_MS)


def test_a_node_that_comes_back_in_time_keeps_its_exclusive_attempt() -> None:
    hand = running()
    hand.pass_ms(TIMING.lost_ms + 250, 250)
    assert hand.state.jobs["a"].lease_awaited is not None
    hand.node()
    assert hand.state.jobs["a"].lease_awaited is None
    hand.out.clear()
    speak(hand, 2 * OVER_MS, ("a", 1, "running"))
    assert (hand.state.jobs["a"].node, hand.state.jobs["a"].attempt) == ("n1", 1)
    assert len(leases(hand)) >= 2


def test_no_lease_is_granted_while_the_release_is_on_its_way() -> None:
    hand = running()
    hand.pass_ms(TIMING.lost_ms + 250, 250)
    until_ms = hand.state.jobs["a"].lease_awaited[1]  # type: ignore[index]
    while hand.now + 250 < until_ms:
        hand.pass_ms(250)
    hand.now = until_ms
    hand.step(e.Tick())
    entry = hand.appended()
    assert entry is not None and isinstance(entry.decisions[0], d.Released)
    hand.out.clear()
    for _ in range(20):
        hand.now += 250
        hand.step(e.StatusReported(status=hand.status_of("n1", ("a", 1, "running"))))
    assert leases(hand) == []


def test_the_end_of_an_exclusive_attempt_is_confirmed_by_its_result_at_once() -> None:
    hand = running()
    assert names(hand.result("a", outcome="failed")) == ["Released", "RetryScheduled"]


def test_the_margin_covers_drift_and_kill() -> None:
    assert margin_ms(12_000) == 120 + LEASE_KILL_MS


# --- the fold ---------------------------------------------------------------------------------


def exclusive_story() -> Story:
    story = Story().add(seen()).ingest(spec("a", exclusive=True))
    return story.add(d.Assigned(job="a", attempt=1, node="n1", incarnation=1, lease_ms=LEASE_MS))


GONE = (
    d.Released(job="a", attempt=1, outcome="node_lost"),
    d.RetryScheduled(job="a", attempt=2, reason="lost", not_before_ms=0),
)


def test_no_reader_takes_a_release_before_the_lease_was_over() -> None:
    with pytest.raises(InvariantBrokenError, match="before its lease was over"):
        exclusive_story().add(*GONE)
    story = exclusive_story()
    awaited = d.LeaseAwaited(job="a", attempt=1, until_ms=story.at_ms + 1_000)
    with pytest.raises(InvariantBrokenError, match="before its lease was over"):
        story.add(awaited).add(*GONE)


def test_a_release_after_the_lease_is_taken() -> None:
    story = exclusive_story()
    story.add(d.LeaseAwaited(job="a", attempt=1, until_ms=story.at_ms + 15))
    assert story.add(d.LeadConfirmed(leases=1)).add(*GONE).state.jobs["a"].lease_awaited is None


def test_an_exclusive_job_is_never_placed_without_a_lease_nor_another_with_one() -> None:
    with pytest.raises(InvariantBrokenError, match="lease of 0 ms"):
        Story().add(seen()).ingest(spec("a", exclusive=True)).assign("a")
    story = Story().add(seen()).ingest(spec("a"))
    with pytest.raises(InvariantBrokenError, match="lease of 9 ms"):
        story.add(d.Assigned(job="a", attempt=1, node="n1", incarnation=1, lease_ms=9))


def test_a_node_that_says_something_new_at_the_end_of_a_lease_does_not_poison_the_ledger() -> None:
    """One entry that has its NodeSeen and the release together: NodeSeen takes back what was
    awaited, so that no reader could carry the release out, now or at any later start."""
    hand = Hand()
    hand.node()
    hand.submit(spec("a", exclusive=True))
    for _ in range(4):
        hand.status("n1")
        hand.pass_ms(250)
    for _ in range(4):
        hand.status("n1", ("a", 1, "running"))
        hand.pass_ms(250)
    while hand.state.jobs["a"].lease_awaited is None:  # the node forgot it
        hand.status("n1")
        hand.pass_ms(250)
    until_ms = hand.state.jobs["a"].lease_awaited[1]
    while hand.now < until_ms - 600:
        hand.status("n1")
        hand.pass_ms(250)
    hand.step(e.NodeReported(report=report_of(seen("n2"))))
    flight = hand.appended()
    assert flight is not None, "a slow Kafka: the lease ends while an entry is on its way"
    hand.out.clear()
    for _ in range(4):
        hand.now += 250
        hand.step(e.StatusReported(status=hand.status_of("n1")))
    hand.step(e.NodeReported(report=report_of(seen("n1", labels={"x": "1"}))))
    hand.out.clear()
    hand.land(flight)
    decisions = names(hand.settle())
    assert decisions[0] == "NodeSeen"
    for _ in range(80):
        hand.status("n1")
        hand.pass_ms(250)
    assert hand.state.jobs["a"].attempt == 2, "it is released in its turn"
