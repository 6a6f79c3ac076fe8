"""Leases on the node: counted by its own clock, from its own stamp, and never revived."""

from idl.control import (
    AssignIntent,
    CancelIntent,
    Intent,
    IntentItem,
    Lease,
    RenewIntent,
)
from idl.jobs import Isolation, JobSpec, Resources
from idl.ledger import Capacity
from node_agent.core import journal
from node_agent.core.attempts import (
    AgentCore,
    AttemptEnded,
    AttemptRunning,
    Effect,
    EndLease,
    ExtendLease,
    HeartbeatDue,
    IntentReceived,
    KillAttempt,
    LeaseDue,
    Phase,
    Restored,
    RunAttempt,
    SendStatus,
)
from node_agent.core.recovery import AdoptAttempt, recover

LENGTH_MS = 1_000
SPEC = JobSpec(
    id="a", command=("x",), exclusive=True, resources=Resources(cpu_millis=100),
    isolation=Isolation(require=()),
)  # fmt: skip


def core() -> AgentCore:
    return AgentCore("main", "n1", 42, Capacity(cpu_millis=2000, memory_bytes=1 << 30), frozenset())


def assign(since_ms: int | None) -> AssignIntent:
    lease = None if since_ms is None else Lease(since_ms=since_ms, length_ms=LENGTH_MS)
    return AssignIntent(job="a", attempt=1, queue="default", spec=SPEC, lease=lease)


def renew(since_ms: int) -> RenewIntent:
    return RenewIntent(job="a", attempt=1, lease=Lease(since_ms=since_ms, length_ms=LENGTH_MS))


def told(agent: AgentCore, item: IntentItem, now_ms: int) -> tuple[Effect, ...]:
    intent = Intent(pool="main", node="n1", node_incarnation=42, term=1, leader="c1", items=(item,))
    return agent.step(IntentReceived(intent), now_ms)


def running(since_ms: int = 5_000) -> AgentCore:
    agent = core()
    told(agent, assign(since_ms), since_ms + 10)
    agent.step(AttemptRunning("a", 1), since_ms + 20)
    return agent


def test_a_status_carries_the_time_at_which_it_was_made() -> None:
    (sent,) = core().step(HeartbeatDue(), 7_000)
    assert isinstance(sent, SendStatus) and sent.status.stamp_ms == 7_000


def test_an_exclusive_assign_without_a_lease_that_lasts_is_not_taken() -> None:
    agent = core()
    assert told(agent, assign(None), 5_000) == ()
    assert told(agent, assign(3_999), 5_000) == (), "it was long on its way"
    assert agent.known == {} and agent.refused_intents == {"lease-over": 2}
    assert told(agent, assign(4_500), 5_000) == (RunAttempt(assign(4_500), 1, 5_500),)


def test_a_lease_ends_by_the_nodes_stamp_however_late_it_came() -> None:
    agent = core()
    told(agent, assign(5_000), 5_900)
    assert agent.next_lease_end_ms == 6_000
    assert agent.step(LeaseDue(), 5_999) == ()
    assert agent.step(LeaseDue(), 6_000) == (EndLease("a", 1),)
    assert agent.step(LeaseDue(), 9_000) == (), "said once"
    agent.step(AttemptEnded("a", 1), 9_001)


def test_every_event_looks_at_the_clock_first() -> None:
    agent = running()
    assert told(agent, renew(5_900), 6_000) == (EndLease("a", 1),), "over is over"
    assert told(agent, assign(5_950), 6_001) == ()


def test_a_renewal_extends_and_an_old_one_changes_nothing() -> None:
    agent = running()
    assert told(agent, renew(5_800), 5_900) == (ExtendLease("a", 1, 6_800),)
    assert told(agent, renew(5_400), 5_950) == ()
    assert told(agent, renew(5_800), 5_950) == (), "twice is once"
    assert told(agent, assign(5_900), 6_000) == (ExtendLease("a", 1, 6_900),), "sent again"
    assert agent.next_lease_end_ms == 6_900


def test_a_stamp_of_the_future_counts_as_one_of_now() -> None:
    agent = running()
    assert told(agent, renew(999_000), 5_500) == (ExtendLease("a", 1, 6_500),)


def test_an_end_before_the_lease_needs_no_fence() -> None:
    agent = running()
    cancel = CancelIntent(job="a", attempt=1, why="asked")
    assert told(agent, cancel, 5_500) == (KillAttempt("a", 1, "asked"),)
    agent.step(AttemptEnded("a", 1), 5_600)
    assert agent.next_lease_end_ms == 0
    assert told(agent, renew(5_600), 5_700) == ()


def test_a_restarted_agent_goes_on_with_the_lease_of_its_journal() -> None:
    agent = core()
    agent.restore({("a", 1): Restored(assign(5_000), Phase.RUNNING, 6_800)}, term=1)
    assert agent.step(HeartbeatDue(), 6_799)[0] != EndLease("a", 1)
    assert agent.step(HeartbeatDue(), 6_800)[0] == EndLease("a", 1)


def test_the_journal_keeps_renewals_also_when_it_is_rewritten() -> None:
    records: tuple[journal.Record, ...] = (
        journal.Accepted(assign=assign(5_000), term=1, at_ms=1, lease_until_ms=6_000),
        journal.Started(job="a", attempt=1, at_ms=2),
        journal.Leased(job="a", attempt=1, until_ms=6_800),
    )
    again = journal.fold(records)
    for state in (again, journal.fold(journal.read(journal.frames(again.records())).records)):
        assert state.entries["a", 1].lease_until_ms == 6_800
        recovery = recover(state, ["a.1"], same_launcher=True)
        assert recovery.restored["a", 1].lease_until_ms == 6_800
        assert isinstance(recovery.effects[0], AdoptAttempt)


def test_what_was_accepted_and_not_launched_is_run_with_the_lease_it_had() -> None:
    accepted = journal.Accepted(assign=assign(5_000), term=1, at_ms=1, lease_until_ms=6_000)
    (effect,) = recover(journal.fold([accepted]), [], same_launcher=True).effects
    assert effect == RunAttempt(assign(5_000), 1, 6_000)
