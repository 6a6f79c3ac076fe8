"""`outrider leader`: the terms in order, and why each ended."""

import pytest

from dataplane.core.state import PoolState
from idl.ledger import LedgerEntry, TermStarted
from outrider.cli.leader import _show, term_documents

HISTORY = (
    ("c1", "nobody was heard"),
    ("c2", "c1 stepped down: transfer ordered"),
    ("c3", "the process of c2 is gone"),
    ("c1", "c3 was not heard"),
    ("c2", "c1 stepped down: it alone cannot reach Kafka"),
)


def state() -> PoolState:
    found = PoolState()
    for offset, (leader, why) in enumerate(HISTORY):
        start = TermStarted(pool="main", previous_term=offset, why=why)
        entry = LedgerEntry(
            term=offset + 1, leader=leader, incarnation=1, seq=1, at_ms=10_000 + 1_500 * offset,
            decisions=(start,),
        )  # fmt: skip
        assert found.apply(offset, entry).valid
    return found


def test_each_term_ended_for_the_reason_that_the_next_leader_knew() -> None:
    documents = term_documents(state())
    assert [(one["term"], one["leader"]) for one in documents] == [
        (number, leader) for number, (leader, _) in enumerate(HISTORY, 1)
    ]
    reasons = [why for _, why in HISTORY[1:]]
    assert [one["ended"] for one in documents] == [*reasons, ""]
    assert [one["ended_ms"] for one in documents] == [11_500, 13_000, 14_500, 16_000, None]


def test_people_read_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    _show(term_documents(state()))
    head, *rows = capsys.readouterr().out.splitlines()
    assert "ENDED BECAUSE" in head
    for row, (leader, _), (_, why) in zip(rows[:-1], HISTORY[:-1], HISTORY[1:], strict=True):
        assert leader in row.split() and "1.5s" in row.split() and row.endswith(why)
    assert rows[-1].rstrip().endswith("leads")
