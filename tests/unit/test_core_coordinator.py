"""The leader's protocol with the ledger, and what follows from events: one rule a test."""

import pytest

from controlplane.core import cycle
from controlplane.core import events as e
from controlplane.core.coordinator import Role
from idl import ledger as d
from idl.control import AssignIntent, CancelIntent, ForgetIntent
from idl.jobs import Limits, Retry
from idl.records import AttemptResult, CancelJob, DrainNode
from tests.unit.core_builders import RETRY_FAST, TIMING, Hand, names, seen, spec, with_running_job

# --- the role and the ledger --------------------------------------------------------------------


def test_a_won_election_only_appends_the_start_of_the_term() -> None:
    hand = Hand(lead=False)
    (append,) = hand.step(e.RoleWon(term=4, why="elected"))
    assert isinstance(append, e.Append)
    assert (append.entry.term, append.entry.seq) == (4, 1)
    assert names(list(append.entry.decisions)) == ["TermStarted"]
    assert hand.core.role.value == "starting"
    out = hand.land(append.entry)
    assert hand.core.role.value == "leading"
    assert [type(x) for x in out[:2]] == [e.Leading, e.OpenIntake]


def test_intake_opens_at_the_positions_of_the_state() -> None:
    hand = Hand()
    hand.submit(spec("a"), spec("b"))
    hand.step(e.RoleLost(reason="test"))
    hand.step(e.RoleWon(term=2))
    hand.out = [x for x in hand.out if isinstance(x, e.Append)]
    hand.settle()
    (opened,) = hand.take(e.OpenIntake)
    assert isinstance(opened, e.OpenIntake) and opened.term == 2
    assert opened.positions == (e.Position(topic="queue.default", partition=0, next_offset=2),)


def test_at_most_one_entry_is_in_flight_and_inputs_gather_meanwhile() -> None:
    hand = Hand()
    for offset in range(3):
        one = e.Submission(
            source=hand.next_source("queue.default"), queue="default", spec=spec(f"j{offset}")
        )
        hand.step(e.SubmissionsRead(term=1, submissions=(one,)))
    assert sum(isinstance(x, e.Append) for x in hand.out) == 1
    assert names(hand.settle()) == ["Ingested"] * 3


def test_nothing_is_sent_before_the_decision_is_read_back() -> None:
    hand = Hand()
    hand.node()
    one = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec("a"))
    hand.step(e.SubmissionsRead(term=1, submissions=(one,)))
    ingest = hand.appended()
    assert ingest is not None
    assert not [x for x in hand.land(ingest) if isinstance(x, e.SendIntent)]
    assigned = hand.appended()
    assert assigned is not None and names(list(assigned.decisions)) == ["Assigned"]
    assert hand.state.jobs["a"].attempt == 0, "a decision changes the state when it is read back"
    assert [x for x in hand.land(assigned) if isinstance(x, e.SendIntent)]


def test_a_failed_append_is_shown_and_the_same_entry_is_appended_again() -> None:
    hand = Hand()
    one = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec("a"))
    hand.step(e.SubmissionsRead(term=1, submissions=(one,)))
    first = hand.appended()
    assert first is not None
    hand.out.clear()
    failed = e.AppendFailed(term=1, seq=first.seq, retryable=True, reason="timed out")
    assert e.ShowKafka(stalled=True, reason="timed out") in hand.step(failed)
    hand.now += 99
    hand.step(e.Tick())
    assert hand.appended() is None, "backoff"
    hand.now += 1
    hand.step(e.Tick())
    assert hand.appended() == first
    assert e.ShowKafka(stalled=False) in hand.land(first)
    hand.land(first)  # the first append had landed too: void by its seq, and no reason to resign
    assert hand.core.role is Role.LEADING and hand.state.void_counts == {"duplicate": 1}


def test_a_late_report_of_failure_is_ignored_after_read_back() -> None:
    hand = Hand()
    hand.submit(spec("a"))
    hand.out.clear()
    assert hand.step(e.AppendFailed(term=1, seq=2, retryable=False, reason="late")) == ()


def test_an_append_that_nobody_answers_is_shown_as_a_stall() -> None:
    hand = Hand()
    one = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec("a"))
    hand.step(e.SubmissionsRead(term=1, submissions=(one,)))
    hand.now += 3_000
    assert any(isinstance(x, e.ShowKafka) and x.stalled for x in hand.step(e.Tick()))
    assert hand.core.role is Role.LEADING, "a stalled Kafka is no reason to resign"


def test_a_refused_append_ends_the_role() -> None:
    hand = Hand(lead=False)
    hand.step(e.RoleWon(term=1))
    hand.step(e.AppendFailed(term=1, seq=1, retryable=False, reason="not authorised"))
    assert hand.core.role is Role.STANDBY
    assert any(isinstance(x, e.Resign) for x in hand.out)


def other(term: int, seq: int = 1) -> d.LedgerEntry:
    start = d.TermStarted(pool="main", previous_term=term - 1)
    return d.LedgerEntry(
        term=term, leader="c2", incarnation=2, seq=seq, at_ms=1, decisions=(start,)
    )


def test_a_higher_term_in_the_ledger_ends_the_role() -> None:
    hand = with_running_job()
    out = hand.land(other(2))
    assert [type(x) for x in out] == [e.CloseIntake, e.Resign]
    assert hand.core.role is Role.STANDBY and hand.state.term == 2
    assert "a" in hand.state.jobs, "the state is still right"


def test_losing_the_race_for_a_term_ends_the_attempt_to_lead() -> None:
    hand = Hand(lead=False)
    hand.step(e.RoleWon(term=1))
    mine = hand.appended()
    assert mine is not None
    hand.land(other(1))
    assert hand.core.role is Role.STANDBY
    hand.land(mine)
    assert hand.state.void_counts == {"not_the_leader": 1}


def test_a_role_won_for_a_used_term_is_given_back() -> None:
    hand = Hand(lead=False)
    hand.land(other(5))
    (resign,) = hand.step(e.RoleWon(term=5))
    assert isinstance(resign, e.Resign)


def test_records_of_an_earlier_intake_are_ignored() -> None:
    hand = Hand()
    stale = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec("a"))
    hand.step(e.SubmissionsRead(term=99, submissions=(stale,)))
    assert hand.settle() == []


def test_records_read_twice_count_once() -> None:
    hand = Hand()
    one = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec("a"))
    for _ in range(2):
        hand.step(e.SubmissionsRead(term=1, submissions=(one, one)))
    assert names(hand.settle()) == ["Ingested"]


def test_a_takeover_tells_again_what_is_not_known_to_be_told() -> None:
    hand = Hand()
    hand.node(seen(cpu=4_000))
    hand.submit(spec("a"), spec("b"))
    hand.status("n1", ("a", 1, "running"), ("b", 1, "accepted"))
    hand.step(e.RoleLost(reason="test"))
    hand.out.clear()
    hand.step(e.RoleWon(term=2))
    hand.settle()
    assert [(type(i), i.job) for i in hand.intents()] == [(AssignIntent, "b")]


# --- admission -----------------------------------------------------------------------------------


def test_job_ids_come_from_spec_key_or_source() -> None:
    hand = Hand()
    for key, job in (("k", "s"), ("key1", ""), ("not a name!", "")):
        one = e.Submission(
            source=hand.next_source("queue.default"), queue="default", key=key, spec=spec(job)
        )
        hand.step(e.SubmissionsRead(term=1, submissions=(one,)))
        hand.settle()
    assert list(hand.state.jobs) == ["s", "key1", "default-0-2"]


def test_refusals_have_codes_and_all_but_duplicates_go_to_the_dead_letter() -> None:
    hand = Hand(depth_max=1)
    poison = e.Submission(
        source=hand.next_source("queue.default"), queue="default", key="k",
        error_code="not-msgpack", error_message="garbage",
    )  # fmt: skip
    hand.step(e.SubmissionsRead(term=1, submissions=(poison,)))
    decisions = hand.settle()
    decisions += hand.submit(spec("a"), spec("a"), spec("b"))
    decisions += hand.submit(spec("c"), queue="nobody")
    codes = [x.code for x in decisions if isinstance(x, d.Rejected)]
    assert codes == ["not-msgpack", "duplicate", "queue-full", "unknown-queue"]
    letters = [x.letter for x in hand.take(e.WriteDeadLetter) if isinstance(x, e.WriteDeadLetter)]
    assert [x.code for x in letters] == ["not-msgpack", "queue-full", "unknown-queue"]
    hand.step(e.DeadLetterWritten(key=letters[0].key))
    assert hand.settle() == [d.DeadLetterStored(key=letters[0].key)]


def test_jobs_beyond_the_operator_s_limits_are_refused() -> None:
    hand = Hand(limits_max={"wall_ms": 1000, "idle_ms": 500})
    within = Limits(wall_ms=1000, idle_ms=500)
    decisions = hand.submit(
        spec("a", limits=within),
        spec("b", limits=Limits(wall_ms=1001, idle_ms=1)),
        spec("c", limits=Limits(wall_ms=1)),
    )
    assert [x.job.id for x in decisions if isinstance(x, d.Ingested)] == ["a"]
    refused = {x.job: (x.code, x.reason) for x in decisions if isinstance(x, d.Rejected)}
    assert {code for code, _ in refused.values()} == {"over-limit"}
    assert "wall_ms is 1001, at most 1000" in refused["b"][1]
    assert "idle_ms is not set" in refused["c"][1]


def test_payload_bytes_never_reach_the_ledger() -> None:
    hand = Hand()
    (ingested,) = hand.submit(spec("a", payload=b"x" * 1_000))
    assert isinstance(ingested, d.Ingested) and ingested.job.payload is None


def test_a_queue_holds_at_most_its_live_jobs_and_the_rest_waits_in_kafka() -> None:
    hand = Hand(live_jobs_max=2)
    hand.submit(*(spec(f"j{n}") for n in range(5)))
    assert len(hand.state.jobs) == 2
    assert hand.take(e.SetIntake) == [e.SetIntake(stream="queue", queue="default", on=False)]
    assert [
        (x.state.admitting, x.state.unread)
        for x in hand.take(e.PublishQueueState)
        if isinstance(x, e.PublishQueueState)
    ][-1] == (False, 3)
    hand.node(seen(cpu=1_000))
    hand.result("j0")
    hand.result("j1")
    assert list(hand.state.jobs) == ["j2", "j3"]


# --- attempts -------------------------------------------------------------------------------------


def test_an_assign_is_sent_again_until_a_status_lists_it() -> None:
    hand = Hand()
    hand.node()
    hand.submit(spec("a"))
    assert [type(i) for i in hand.intents()] == [AssignIntent]
    hand.pass_ms(TIMING.resend_ms, 200)
    assert [type(i) for i in hand.intents()] == [AssignIntent]
    hand.status("n1", ("a", 1, "accepted"))
    hand.pass_ms(1_000, 200)
    assert hand.intents() == []


def test_a_result_finishes_the_job_and_the_node_may_forget() -> None:
    hand = with_running_job()
    assert names(hand.result("a")) == ["Released", "Finished"]
    assert hand.intents() == [ForgetIntent(job="a", attempt=1)]


OUTCOMES = [
    ("succeeded", Retry(), "Finished", ""),
    ("failed", RETRY_FAST, "RetryScheduled", ""),
    ("platform", RETRY_FAST, "RetryScheduled", ""),
    ("killed", RETRY_FAST, "RetryScheduled", ""),
    ("timed_out", Retry(), "DeadLettered", "NotRetried"),
    ("out_of_memory", Retry(), "DeadLettered", "NotRetried"),
    ("failed", Retry(max_attempts=1), "DeadLettered", "AttemptsExhausted"),
    ("failed", Retry(on=("node_lost",)), "DeadLettered", "NotRetried"),
]


@pytest.mark.parametrize(("outcome", "retry", "verdict", "code"), OUTCOMES)
def test_what_an_end_means(outcome: str, retry: Retry, verdict: str, code: str) -> None:
    hand = with_running_job(retry=retry)
    decisions = hand.result("a", outcome=outcome)  # type: ignore[arg-type]
    assert names(decisions) == ["Released", verdict]
    assert getattr(decisions[1], "code", "") == code


def test_a_retry_waits_for_its_backoff_and_is_a_new_attempt() -> None:
    hand = with_running_job(retry=RETRY_FAST)
    hand.result("a", outcome="failed")
    wake = hand.core.next_wakeup_ms(hand.now)
    assert wake is not None and wake <= hand.now + 100
    hand.pass_ms(99, 99)
    assert hand.state.jobs["a"].attempt == 1
    hand.pass_ms(1)
    assert hand.state.jobs["a"].attempt == 2
    assert names(hand.result("a", attempt=2, outcome="failed")) == ["Released", "DeadLettered"]
    (letter,) = hand.take(e.WriteDeadLetter)
    assert isinstance(letter, e.WriteDeadLetter)
    assert [a.outcome for a in letter.letter.attempts] == ["failed", "failed"]


def test_results_that_are_not_of_the_current_attempt_are_refused() -> None:
    hand = with_running_job()
    refused = [
        *hand.result("a", attempt=2), *hand.result("a", node="n9"), *hand.result("nobody"),
    ]  # fmt: skip
    hand.result("a")
    refused += hand.result("a")
    bad = e.ResultRead(
        source=hand.next_source("results"), key="a", error_code="invalid-record", error_message="x"
    )
    hand.step(e.ResultsRead(term=1, results=(bad,)))
    refused += hand.settle()
    assert names(refused) == ["ResultRefused"] * 5
    assert hand.state.positions[("results", 0)] == 6


def test_two_results_of_one_job_never_share_an_entry() -> None:
    hand = with_running_job()
    results = tuple(
        e.ResultRead(
            source=hand.next_source("results"),
            result=AttemptResult(job="a", attempt=1, node="n1", term=1, outcome="succeeded"),
        )
        for _ in range(2)
    )
    hand.step(e.ResultsRead(term=1, results=results))
    entry = hand.appended()
    assert entry is not None and names(list(entry.decisions)) == ["Released", "Finished"]
    assert names(hand.settle())[-1] == "ResultRefused"


def test_room_is_filled_by_the_entry_that_frees_it() -> None:
    hand = Hand()
    hand.node(seen(cpu=1_000))
    hand.submit(spec("a"), spec("b"))
    hand.status("n1", ("a", 1, "running"))
    assert names(hand.result("a")) == ["Released", "Finished", "Assigned"]


# --- operators and deadlines ---------------------------------------------------------------------


def test_cancelling_a_pending_job_ends_it_at_once() -> None:
    hand = Hand()
    hand.submit(spec("a"))
    assert names(hand.command(CancelJob(job="a"))) == ["Commanded", "Cancelled"]


def test_cancelling_a_running_job_waits_for_its_end() -> None:
    hand = with_running_job()
    assert names(hand.command(CancelJob(job="a"))) == ["Commanded"]
    assert [type(i) for i in hand.intents()] == [CancelIntent]
    hand.pass_ms(200)
    assert [type(i) for i in hand.intents()] == [CancelIntent]
    assert names(hand.result("a", outcome="killed")) == ["Released", "Cancelled"]
    hand.intents()
    hand.pass_ms(1_000)
    assert hand.intents() == []


def test_cancelling_an_unacknowledged_attempt_tells_both_in_order() -> None:
    hand = Hand()
    hand.node()
    hand.submit(spec("a"))
    hand.intents()
    hand.command(CancelJob(job="a"))
    assert [type(i) for i in hand.intents()] == [AssignIntent, CancelIntent]


def test_a_success_that_overtook_its_cancellation_counts() -> None:
    hand = with_running_job()
    hand.command(CancelJob(job="a"))
    assert names(hand.result("a")) == ["Released", "Finished"]


REFUSED = [
    (CancelJob(job="nobody"), "no such job"),
    (CancelJob(job="a/b"), "not a name"),
    (DrainNode(node="n9"), "ever seen"),
]


@pytest.mark.parametrize(("command", "why"), REFUSED)
def test_commands_are_refused_with_a_reason(command: object, why: str) -> None:
    (said,) = Hand().command(command)
    assert isinstance(said, d.Commanded) and why in said.refused


def test_a_drained_node_takes_nothing_until_it_may_again() -> None:
    hand = Hand()
    hand.node()
    hand.command(DrainNode(node="n1"))
    assert names(hand.submit(spec("a"))) == ["Ingested"]
    assert "Assigned" in names(hand.command(DrainNode(node="n1", drain=False)))


def test_an_unplaceable_job_says_so_once() -> None:
    hand = Hand()
    hand.node()
    hand.pass_ms(2_000)
    hand.status("n1")
    decisions = hand.submit(spec("a", gpus=2))
    waiting = [x for x in decisions if isinstance(x, d.Waiting)]
    assert [(x.code, x.message) for x in waiting] == [("NoMatchingNode", "no node offers 2 GPUs")]
    hand.pass_ms(1_000)
    assert hand.settle() == []
    assert "Waiting" not in names(hand.node(seen("n2", labels={"zone": "b"})))


def test_each_of_many_unplaceable_jobs_is_told_once_whenever_it_came() -> None:
    """More than one entry holds, more while the telling goes on, and after all of them left."""
    hand = Hand()
    hand.node()
    hand.pass_ms(2_000)
    hand.status("n1")
    asks = [spec(f"j{n}", gpus=2) for n in range(1_200)]
    decisions = hand.submit(*asks[:1_100]) + hand.submit(*asks[1_100:])
    told = [x.job for x in decisions if isinstance(x, d.Waiting)]
    assert sorted(told) == sorted(job.id for job in asks)
    for job in asks:
        hand.command(CancelJob(job=job.id))
    again = hand.submit(spec("again", gpus=2))
    assert [x.job for x in again if isinstance(x, d.Waiting)] == ["again"]
    more = hand.node(seen("n2", gpus=(0, 1), draining=True))
    assert [(x.job, x.message) for x in more if isinstance(x, d.Waiting)] == [
        ("again", "no single node offers all of: draining, 2 GPUs")
    ]


def test_a_job_that_does_not_start_in_time_is_dead_with_its_reason() -> None:
    hand = Hand()
    hand.node()
    hand.submit(spec("a", gpus=1, start_within_ms=700))
    hand.pass_ms(699, 699)
    assert "a" in hand.state.jobs
    hand.pass_ms(1)
    ended = hand.state.ended["a"]
    assert ended.code == "StartDeadlinePassed" and "NoMatchingNode" in ended.reason


def test_jobs_of_many_shapes_that_are_late_at_once_end_in_several_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why each of them fits nowhere takes a look at every node."""
    monkeypatch.setattr(cycle, "WAITING_CHECKS_MAX", 10)
    hand = Hand()
    for number in range(5):
        hand.node(seen(f"n{number}"))
    late = [spec(f"j{n:02}", gpus=1 + n, start_within_ms=700) for n in range(20)]
    hand.submit(*late, *(spec(f"same{n}", gpus=99, start_within_ms=700) for n in range(20)))
    hand.now += 800
    hand.step(e.Tick())
    first = hand.appended()
    assert first is not None
    ends = [one for one in first.decisions if isinstance(one, d.DeadLettered)]
    assert 0 < len(ends) < 20
    hand.settle()
    hand.pass_ms(1_000, slice_ms=50)
    assert not hand.state.jobs, "the others' turn comes"


def test_a_job_that_started_once_has_no_start_deadline() -> None:
    hand = with_running_job(start_within_ms=500, retry=RETRY_FAST)
    hand.result("a", outcome="failed")
    for _ in range(4):
        hand.pass_ms(500)
        hand.status("n1", ("a", 2, "running"))
    assert hand.state.jobs["a"].attempt == 2


# --- bounds --------------------------------------------------------------------------------------


def test_batches_are_bounded_and_nothing_is_left_behind() -> None:
    hand = Hand(live_jobs_max=5_000)
    hand.node(seen(cpu=4_000_000, memory=2**50))
    specs = [spec(f"j{n}") for n in range(1_500)]
    submissions = tuple(
        e.Submission(source=hand.next_source("queue.default"), queue="default", spec=s)
        for s in specs
    )
    hand.step(e.SubmissionsRead(term=1, submissions=submissions))
    sizes: list[int] = []
    while (entry := hand.appended()) is not None:
        hand.out = [x for x in hand.out if not isinstance(x, e.Append)]
        sizes.append(len(entry.decisions))
        hand.land(entry)
    assert max(sizes) == 512 and sum(sizes) == 3_000
    messages = [x.intent for x in hand.take(e.SendIntent) if isinstance(x, e.SendIntent)]
    assert max(len(message.items) for message in messages) <= 128
    assert sum(len(message.items) for message in messages) == 1_500


def test_large_specs_make_small_batches_and_messages() -> None:
    hand = Hand()
    hand.node(seen(cpu=1_000_000, memory=2**50))
    hand.submit(*(spec(f"j{n}", env={"X": "x" * 60_000}) for n in range(100)))
    messages = [x.intent for x in hand.take(e.SendIntent) if isinstance(x, e.SendIntent)]
    assert max(len(message.items) for message in messages) == 2
    assert len(hand.state.jobs) == 100


def test_the_driver_is_told_when_to_wake_it() -> None:
    hand = Hand(lead=False)
    assert hand.core.next_wakeup_ms(hand.now) is None
    hand.step(e.RoleWon(term=1))
    assert hand.core.next_wakeup_ms(hand.now) == hand.now + 500
    hand.settle()
    soon = hand.core.next_wakeup_ms(hand.now)
    assert soon is not None and hand.now < soon <= hand.now + 500


def test_a_node_that_changes_takes_nothing_in_the_entry_that_says_so() -> None:
    hand = Hand()
    hand.node(seen(cpu=1_000))
    hand.submit(spec("a"), spec("b"))
    hand.status("n1", ("a", 1, "running"))
    one = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec("c"))
    hand.step(e.SubmissionsRead(term=1, submissions=(one,)))  # in flight: the rest gathers
    result = AttemptResult(job="a", attempt=1, node="n1", term=1, outcome="succeeded")
    read = e.ResultRead(source=hand.next_source("results"), result=result)
    hand.step(e.ResultsRead(term=1, results=(read,)))
    assert names(hand.node(seen(cpu=1_000, incarnation=2))) == [
        "Ingested", "Released", "Finished", "NodeSeen", "Assigned",
    ]  # fmt: skip
    assert hand.state.jobs["b"].incarnation == 2


def test_dead_letters_not_known_to_be_stored_are_ordered_again() -> None:
    hand = Hand()
    hand.submit(spec("a"), queue="nobody")
    assert len(hand.take(e.WriteDeadLetter)) == 1
    hand.pass_ms(29_000)
    assert hand.take(e.WriteDeadLetter) == []
    hand.pass_ms(2_000)
    assert len(hand.take(e.WriteDeadLetter)) == 1
    hand.step(e.RoleLost(reason="test"))
    hand.step(e.RoleWon(term=2))
    hand.settle()
    assert len(hand.take(e.WriteDeadLetter)) == 1, "at once on takeover"
