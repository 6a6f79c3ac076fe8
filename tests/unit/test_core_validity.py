"""Which ledger entries count: the rule as a table of little histories."""

import pytest

from dataplane.core.validity import TermGate
from idl.ledger import Decision, LedgerEntry, Started, TermStarted

START = TermStarted(pool="main", previous_term=0)
OTHER = Started(job="a", attempt=1)


def entry(
    term: int, seq: int, *, leader: str = "a", incarnation: int = 1, starts: bool | None = None
) -> LedgerEntry:
    first: Decision = START if (starts if starts is not None else seq == 1) else OTHER
    return LedgerEntry(
        term=term, leader=leader, incarnation=incarnation, seq=seq, at_ms=0, decisions=(first,)
    )


CASES: dict[str, tuple[list[LedgerEntry], list[str]]] = {
    "a term and its decisions": ([entry(1, 1), entry(1, 2), entry(1, 3)], ["", "", ""]),
    "terms may jump": ([entry(3, 1), entry(9, 1, leader="b")], ["", ""]),
    "zombie writes late": (
        [entry(1, 1), entry(2, 1, leader="b"), entry(1, 2), entry(2, 2, leader="b")],
        ["", "", "older_term", ""],
    ),
    "producer repeats": ([entry(1, 1), entry(1, 2), entry(1, 2)], ["", "", "duplicate"]),
    "start repeated": ([entry(1, 1), entry(1, 1)], ["", "duplicate"]),
    "a hole in seq": (
        [entry(1, 1), entry(1, 3), entry(1, 2), entry(1, 3)], ["", "gap", "", ""],
    ),
    "two starters of one term": (
        [entry(1, 1), entry(1, 1, leader="b"), entry(1, 2, leader="b"), entry(1, 2)],
        ["", "not_the_leader", "not_the_leader", ""],
    ),
    "restarted process claims its old term": (
        [entry(1, 1), entry(1, 2, incarnation=2)], ["", "not_the_leader"],
    ),
    "decision of a term never started": (
        [entry(1, 1), entry(2, 1, starts=False), entry(1, 2)], ["", "term_not_started", ""],
    ),
    "start with a wrong seq": (
        [entry(1, 1), entry(2, 2, starts=True), entry(1, 2)], ["", "term_not_started", ""],
    ),
    "start inside a term": ([entry(1, 1), entry(1, 2, starts=True)], ["", "malformed"]),
    "nothing before the first term": ([entry(0, 1, starts=False)], ["not_the_leader"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str) -> None:
    entries, expected = CASES[name]
    gate = TermGate()
    assert [gate.judge(i, found).reason for i, found in enumerate(entries)] == expected


def test_offsets_must_grow_and_may_have_holes() -> None:
    gate = TermGate()
    gate.judge(5, entry(1, 1))
    gate.judge(9, entry(1, 2))
    assert gate.next_offset == 10
    with pytest.raises(ValueError, match="read already"):
        gate.judge(9, entry(1, 3))


def test_a_start_with_decisions_beside_it_counts() -> None:
    both = LedgerEntry(term=1, leader="a", incarnation=1, seq=1, at_ms=0, decisions=(START, OTHER))
    assert TermGate().judge(0, both).valid
