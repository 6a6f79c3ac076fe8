"""How often a leader writes: company for an entry under load, no wait without it."""

from controlplane.core import events as e
from controlplane.core.bounds import ENTRY_FULL_DECISIONS, ENTRY_GAP_ATTEMPTS, ENTRY_GAP_MS_MAX
from controlplane.core.pace import EntryPace, entry_gap_ms
from idl.records import AttemptResult
from tests.unit.core_builders import Hand, names, seen, spec

MANY = 32


def test_the_gap_grows_with_the_attempts_that_are_out_and_ends() -> None:
    assert entry_gap_ms(0) == entry_gap_ms(ENTRY_GAP_ATTEMPTS) == 0
    assert 0 < entry_gap_ms(16) < entry_gap_ms(MANY) < ENTRY_GAP_MS_MAX
    assert entry_gap_ms(10_000) == ENTRY_GAP_MS_MAX


def test_the_first_entry_after_a_quiet_time_waits_for_nothing() -> None:
    pace = EntryPace()
    assert not pace.holds(MANY, 1_000)
    pace.appended(1, 1_000)
    assert pace.holds(MANY, 1_001)
    assert pace.held_until_ms == 1_000 + entry_gap_ms(MANY)
    assert not pace.holds(MANY, pace.held_until_ms)


def test_a_full_entry_and_a_new_lead_wait_for_nothing() -> None:
    pace = EntryPace()
    pace.appended(ENTRY_FULL_DECISIONS, 1_000)
    assert not pace.holds(MANY, 1_001)
    pace.appended(1, 1_000)
    pace.lead()
    assert not pace.holds(MANY, 1_001)


def _result(hand: Hand, job: str) -> None:
    result = AttemptResult(job=job, attempt=1, node="n1", term=1, outcome="succeeded")
    read = e.ResultRead(source=hand.next_source("results"), result=result)
    hand.step(e.ResultsRead(term=1, results=(read,)))


def test_ends_under_load_share_an_entry() -> None:
    hand = Hand()
    hand.node(seen(cpu=100_000, memory=1 << 40))
    jobs = [f"j{n}" for n in range(MANY)]
    hand.submit(*(spec(job) for job in jobs))
    hand.pass_ms(100)
    assert all(hand.state.jobs[job].attempt == 1 for job in jobs)
    _result(hand, "j0")
    assert names(hand.settle()) == ["Released", "Finished"], "after a quiet time: at once"
    for job in jobs[1:4]:
        _result(hand, job)
    assert hand.settle() == [], "held back"
    due_ms = hand.core.next_wakeup_ms(hand.now)
    assert due_ms is not None and 0 < due_ms - hand.now <= ENTRY_GAP_MS_MAX
    hand.now = due_ms
    hand.step(e.Tick())
    assert names(hand.settle()) == ["Released", "Finished"] * 3, "in one entry"
