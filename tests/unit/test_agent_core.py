"""The agent's core: fencing, idempotence, acknowledgement, and never more than the node offers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idl.control import AssignIntent, AttemptView, CancelIntent, ForgetIntent, Intent, IntentItem
from idl.errors import InvariantBrokenError
from idl.jobs import Isolation, JobSpec, LimitName, Resources
from idl.ledger import Capacity
from node_agent.core.attempts import (
    AgentCore,
    AttemptEnded,
    AttemptRunning,
    Effect,
    HeartbeatDue,
    IntentReceived,
    KillAttempt,
    Phase,
    RefuseAttempt,
    ResultDelivered,
    RunAttempt,
    SendStatus,
)  # fmt: skip

LIMITS: tuple[LimitName, ...] = ("memory", "pids")


def core() -> AgentCore:
    capacity = Capacity(cpu_millis=2000, memory_bytes=1 << 30, gpus=(0, 1))
    return AgentCore("main", "n1", 42, capacity, frozenset(LIMITS))


def assign(job: str = "a", attempt: int = 1, cpu: int = 500, gpus: tuple[int, ...] = (),
           require: tuple[LimitName, ...] = LIMITS) -> AssignIntent:  # fmt: skip
    spec = JobSpec(
        id=job,
        command=("x",),
        resources=Resources(cpu_millis=cpu, memory_bytes=64 << 20, gpus=len(gpus)),
        isolation=Isolation(require=require),
    )
    return AssignIntent(job=job, attempt=attempt, queue="default", spec=spec, gpus=gpus)


def intent(*items: IntentItem, term: int = 1, node: str = "n1", incarnation: int = 42,
           pool: str = "main") -> IntentReceived:  # fmt: skip
    return IntentReceived(
        Intent(pool=pool, node=node, node_incarnation=incarnation, term=term, leader="c1",
               items=items)
    )  # fmt: skip


def statuses(effects: tuple[Effect, ...]) -> list[tuple[str, int, str]]:
    return [
        (view.job, view.attempt, view.phase)
        for effect in effects
        if isinstance(effect, SendStatus)
        for view in effect.status.attempts
    ]


def test_an_attempt_from_assign_to_forget() -> None:
    agent = core()
    assert agent.step(intent(assign()), 0) == (RunAttempt(assign(), 1),)
    assert statuses(agent.flush()) == [("a", 1, "accepted")]
    agent.step(AttemptRunning("a", 1), 0)
    assert statuses(agent.flush()) == [("a", 1, "running")]
    agent.step(AttemptEnded("a", 1), 0)
    assert agent.live == ()
    agent.step(ResultDelivered("a", 1), 0)
    assert statuses(agent.flush()) == [("a", 1, "ended")]
    assert agent.flush() == ()
    agent.step(intent(ForgetIntent(job="a", attempt=1)), 0)
    (beat,) = agent.step(HeartbeatDue(), 0)
    assert isinstance(beat, SendStatus)
    assert beat.status.full
    assert beat.status.attempts == ()


def test_news_go_to_the_leader_that_spoke_last_and_full_lists_to_all() -> None:
    agent = core()
    assert not agent.has_news
    agent.step(intent(assign()), 0)
    assert agent.has_news
    (told,) = agent.flush()
    assert isinstance(told, SendStatus)
    assert (told.to, told.status.full) == ("c1", False)
    agent.step(intent(assign("b"), term=0), 0)
    assert agent.leader == "c1", "an older leader's intent is refused"
    (beat,) = agent.step(HeartbeatDue(), 0)
    assert isinstance(beat, SendStatus)
    assert (beat.to, beat.status.full) == ("", True)
    assert not agent.has_news


def test_a_resent_assign_is_acknowledged_and_runs_nothing_twice() -> None:
    agent = core()
    agent.step(intent(assign()), 0)
    agent.flush()
    assert agent.step(intent(assign()), 0) == ()
    assert statuses(agent.flush()) == [("a", 1, "accepted")]
    agent.step(AttemptEnded("a", 1), 0)
    agent.step(ResultDelivered("a", 1), 0)
    assert agent.step(intent(assign(), term=2), 0) == (), "ended is remembered until forgotten"


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        (intent(assign("b"), term=4), "older-term"),
        (intent(assign("b"), term=5, incarnation=41), "other-incarnation"),
        (intent(assign("b"), term=5, node="n2"), "not-for-this-node"),
        (intent(assign("b"), term=5, pool="other"), "not-for-this-node"),
    ],
)
def test_fencing(received: IntentReceived, reason: str) -> None:
    agent = core()
    agent.step(intent(assign(), term=5), 0)
    assert agent.step(received, 0) == ()
    assert agent.refused_intents == {reason: 1}
    assert set(agent.known) == {("a", 1)}


def test_what_the_node_cannot_enforce_is_refused_not_run() -> None:
    agent = core()
    (effect,) = agent.step(intent(assign(require=("memory", "seccomp"))), 0)
    assert isinstance(effect, RefuseAttempt)
    assert "seccomp" in effect.detail
    assert agent.live == ()


def test_over_commitment_is_refused() -> None:
    agent = core()
    agent.step(intent(assign("a", cpu=1500)), 0)
    (effect,) = agent.step(intent(assign("b", cpu=600)), 0)
    assert isinstance(effect, RefuseAttempt)
    (gpu,) = agent.step(intent(assign("c", cpu=100, gpus=(1,))), 0)
    assert isinstance(gpu, RunAttempt)
    (again,) = agent.step(intent(assign("d", cpu=100, gpus=(1,))), 0)
    assert isinstance(again, RefuseAttempt)
    agent.check_invariants()


def test_cancel_kills_what_lives_and_nothing_else() -> None:
    agent = core()
    agent.step(intent(assign()), 0)
    cancel = intent(CancelIntent(job="a", attempt=1, why="asked"))
    assert agent.step(cancel, 0) == (KillAttempt("a", 1, "asked"),)
    agent.step(AttemptEnded("a", 1), 0)
    assert agent.step(cancel, 0) == ()
    assert agent.step(intent(CancelIntent(job="zz", attempt=1, why="asked")), 0) == ()


def test_an_impossible_transition_is_our_bug() -> None:
    agent = core()
    with pytest.raises(InvariantBrokenError, match="unknown"):
        agent.step(AttemptRunning("a", 1), 0)
    agent.step(intent(assign()), 0)
    with pytest.raises(InvariantBrokenError, match="accepted → ended"):
        agent.step(ResultDelivered("a", 1), 0)


ITEMS = st.one_of(
    st.builds(assign, st.sampled_from("abc"), st.integers(1, 2), st.sampled_from([400, 900])),
    st.builds(CancelIntent, job=st.sampled_from("abc"), attempt=st.integers(1, 2),
              why=st.just("asked")),
    st.builds(ForgetIntent, job=st.sampled_from("abc"), attempt=st.integers(1, 2)),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), ITEMS, st.booleans()), max_size=40))
def test_any_history_runs_each_attempt_once_and_never_overcommits(
    history: list[tuple[int, IntentItem, bool]],
) -> None:
    """Any order, repetition and mixture of terms; attempts end when the history says so."""
    agent, ran, forgotten, highest = core(), [], set(), 0
    for term, item, ends in history:
        effects = agent.step(intent(item, term=term), 0)
        highest = max(highest, term)
        assert agent.term == highest
        assert not (effects and term < highest)
        ran += [(e.assign.job, e.assign.attempt) for e in effects if isinstance(e, RunAttempt)]
        if isinstance(item, ForgetIntent) and (item.job, item.attempt) not in agent.known:
            forgotten.add((item.job, item.attempt))
        for effect in effects:
            if isinstance(effect, RefuseAttempt) or (isinstance(effect, RunAttempt) and ends):
                agent.step(AttemptEnded(effect.assign.job, effect.assign.attempt), 0)
                agent.step(ResultDelivered(effect.assign.job, effect.assign.attempt), 0)
        agent.check_invariants()
    for key in set(ran) - forgotten:
        assert ran.count(key) == 1
    (beat,) = agent.step(HeartbeatDue(), 0)
    assert isinstance(beat, SendStatus)
    phases = {(v.job, v.attempt): v.phase for v in beat.status.attempts}
    assert phases.keys() == agent.known.keys()
    assert all((p == "ended") == (agent.known[k] in (Phase.ENDED, Phase.REPORTING))
               for k, p in phases.items())  # fmt: skip
    assert all(isinstance(view, AttemptView) for view in beat.status.attempts)
