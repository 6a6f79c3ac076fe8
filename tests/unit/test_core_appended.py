"""An acknowledgement is the reading back of an entry, where nothing unread is before it."""

from controlplane.core import events as e
from controlplane.core.coordinator import Role
from idl import ledger as d
from tests.unit.core_builders import Hand, names, spec


def _submit(hand: Hand, job: str) -> d.LedgerEntry:
    one = e.Submission(source=hand.next_source("queue.default"), queue="default", spec=spec(job))
    hand.step(e.SubmissionsRead(term=hand.core.term, submissions=(one,)))
    entry = hand.appended()
    assert entry is not None
    hand.out.clear()
    return entry


def _appended(entry: d.LedgerEntry, offset: int) -> e.Appended:
    return e.Appended(term=entry.term, seq=entry.seq, offset=offset)


def test_an_entry_acknowledged_at_the_next_offset_counts_and_its_reading_is_ignored() -> None:
    hand = Hand()
    hand.node()
    entry = _submit(hand, "a")
    hand.step(_appended(entry, hand.offset))
    assert "a" in hand.state.jobs
    next_one = hand.appended()
    assert next_one is not None and names(list(next_one.decisions)) == ["Assigned"]
    digest = hand.state.digest
    hand.land(entry)
    assert hand.state.digest == digest and hand.state.ingested == 1


def test_the_start_of_a_term_may_be_acknowledged() -> None:
    hand = Hand(lead=False)
    (append,) = hand.step(e.RoleWon(term=1))
    assert isinstance(append, e.Append) and hand.core.must_read
    hand.step(_appended(append.entry, 0))
    assert hand.core.role is Role.LEADING and not hand.core.must_read


def test_an_entry_behind_something_unread_waits_until_that_is_read() -> None:
    hand = Hand()
    entry = _submit(hand, "a")
    rival = d.LedgerEntry(
        term=2, leader="c2", incarnation=7, seq=1, at_ms=hand.now,
        decisions=(d.TermStarted(pool="main", previous_term=1),),
    )  # fmt: skip
    hand.step(_appended(entry, hand.offset + 1))
    assert not hand.state.jobs and hand.core.role is Role.LEADING and hand.core.must_read
    hand.land(rival)
    assert hand.core.role.value == "standby"
    hand.land(entry)
    assert not hand.state.jobs, "void: the rival's term was first"


def test_an_offset_that_the_broker_does_not_say_is_no_offset() -> None:
    hand = Hand()
    entry = _submit(hand, "a")
    hand.step(_appended(entry, -1))
    assert not hand.state.jobs and hand.core.must_read
    hand.land(entry)
    assert "a" in hand.state.jobs and not hand.core.must_read


def test_an_acknowledgement_of_an_earlier_entry_or_role_is_nothing() -> None:
    hand = Hand()
    entry = _submit(hand, "a")
    hand.land(entry)
    later = _submit(hand, "b")
    hand.step(_appended(entry, hand.offset))
    assert "b" not in hand.state.jobs
    hand.step(e.RoleLost(reason="test"))
    hand.step(_appended(later, hand.offset))
    assert "b" not in hand.state.jobs, "a standby reads"
