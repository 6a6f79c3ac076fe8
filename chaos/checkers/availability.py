"""For how long nobody decided anything. Reported, never judged: a fault has its price."""

import itertools
from bisect import bisect_left
from statistics import median
from typing import Final, NamedTuple

from chaos.checkers.verdict import Verdict
from chaos.history import EntryRead, FaultBegan, FaultHealed, History, Invoked, of

AFTER_HEALING_MS: Final = 5_000.0
"""A fault answers for the silence that begins before this long after its healing."""


class Gap(NamedTuple):
    """The longest silence of a fault: nothing valid was read between `start_ms` and `end_ms`."""

    fault: int
    kind: str
    hit_leader: bool
    start_ms: float
    end_ms: float

    @property
    def length_ms(self) -> float:
        """How long nobody decided."""
        return self.end_ms - self.start_ms


def decisions_at(history: History) -> list[float]:
    """When valid entries were read, in order."""
    return [read.at_ms for read in of(EntryRead, history) if read.valid]


def _hits_all(fault: FaultBegan) -> bool:
    """Nobody decides without a leader and without the broker."""
    return fault.hit_leader or "broker" in fault.targets


def gaps(history: History) -> list[Gap]:
    """The longest silence of each fault.

    A silence between two decisions belongs to one fault: to the first that hit leader or broker in
    it, else the first that began in it, else the newest before it that was not healed for
    AFTER_HEALING_MS. It counts from the fault on, and only from the first submission in it: where
    nothing is asked there is nothing to decide.
    """
    heard = decisions_at(history)
    asked = [event.at_ms for event in of(Invoked, history)]
    healed = {event.fault: event.at_ms for event in of(FaultHealed, history)}
    began = of(FaultBegan, history)
    longest = {
        one.fault: Gap(one.fault, one.kind, one.hit_leader, one.at_ms, one.at_ms) for one in began
    }
    for start, end in itertools.pairwise(heard):
        inside = [fault for fault in began if start <= fault.at_ms < end]
        guilty = next(filter(_hits_all, inside), next(iter(inside), None))
        if guilty is None:
            open_ones = [
                fault
                for fault in began
                if fault.at_ms <= start <= healed.get(fault.fault, start) + AFTER_HEALING_MS
            ]
            guilty = open_ones[-1] if open_ones else None
        if guilty is None:
            continue
        since = max(start, guilty.at_ms)
        first = bisect_left(asked, since)
        since = asked[first] if first < len(asked) else end
        if end - since > longest[guilty.fault].length_ms:
            longest[guilty.fault] = Gap(guilty.fault, guilty.kind, guilty.hit_leader, since, end)
    return list(longest.values())


def availability(history: History) -> Verdict:
    """Longest silence after each fault, by kind, those that hit the leader apart."""
    by_kind: dict[str, list[float]] = {}
    for gap in gaps(history):
        kind = f"{gap.kind} of the leader" if gap.hit_leader else gap.kind
        by_kind.setdefault(kind, []).append(gap.length_ms)
    figures: dict[str, str | int | float] = {}
    for kind, lengths in sorted(by_kind.items()):
        figures[kind] = (
            f"{len(lengths)} times, nobody decided for {median(lengths):.0f} ms "
            f"(median), {max(lengths):.0f} ms (longest)"
        )
    return Verdict(checker="availability", outcome="pass", figures=figures)
