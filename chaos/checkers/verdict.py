"""What a checker says. `unknown`: the history does not hold enough to judge; it is not a pass."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

Outcome = Literal["pass", "unknown", "fail"]
SEVERITY: Final[dict[str, int]] = {"pass": 0, "unknown": 1, "fail": 2}
PROBLEMS_SHOWN: Final = 50
"""A broken rule tends to break often; the rest is counted."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Of one checker. `figures` are for people."""

    checker: str
    outcome: Outcome
    problems: tuple[str, ...] = ()
    figures: dict[str, str | int | float] = {}


def judged(
    checker: str, problems: Iterable[str], figures: dict[str, str | int | float] | None = None
) -> Verdict:
    """`fail` where there are problems, else `pass`."""
    found = list(problems)
    shown = found[:PROBLEMS_SHOWN]
    if len(found) > PROBLEMS_SHOWN:
        shown.append(f"… and {len(found) - PROBLEMS_SHOWN} more")
    return Verdict(checker=checker, outcome="fail" if found else "pass", problems=tuple(shown),
                   figures=figures or {})  # fmt: skip


def excused(verdict: Verdict, why: str) -> Verdict:
    """The same, but for a failure that the harness itself may have caused: that is unknown."""
    if verdict.outcome != "fail":
        return verdict
    problems = (f"not held against the cluster: {why}", *verdict.problems)
    return msgspec.structs.replace(verdict, outcome="unknown", problems=problems)


def worst(verdicts: Iterable[Verdict]) -> Outcome:
    """Jepsen's rule: the worst verdict is that of the run. Of none: unknown."""
    found = [verdict.outcome for verdict in verdicts]
    return max(found, key=lambda outcome: SEVERITY[outcome], default="unknown")
