"""Checkers: pure functions of a history (Jepsen). The worst verdict is that of the run."""

from collections.abc import Callable, Iterable
from typing import Final

from chaos.checkers.account import account, decided
from chaos.checkers.availability import availability
from chaos.checkers.ledger import attempts, audit, exclusive, replay, room, terms
from chaos.checkers.machine import crashes, healing, leftovers
from chaos.checkers.results import overlaps, results
from chaos.checkers.verdict import Verdict, excused, worst
from chaos.history import History

__all__ = ["CHECKERS", "Verdict", "judge", "worst"]

CHECKERS: Final[dict[str, Callable[[History], Verdict]]] = {
    "account": account, "decided": decided, "terms": terms, "attempts": attempts, "room": room,
    "exclusive": exclusive, "results": results, "overlaps": overlaps, "replay": replay,
    "audit": audit, "crashes": crashes, "leftovers": leftovers, "availability": availability,
}  # fmt: skip


def judge(history: History, names: Iterable[str] = ()) -> list[Verdict]:
    """The verdicts of the named checkers, of all where none is named.

    Where a fault was not healed none of them is a failure: the first one, `healing`, tells why.
    """
    verdicts = [CHECKERS[name](history) for name in (tuple(names) or CHECKERS)]
    healed = healing(history)
    if healed.outcome == "pass":
        return verdicts
    return [healed, *(excused(verdict, "a fault was not healed") for verdict in verdicts)]
