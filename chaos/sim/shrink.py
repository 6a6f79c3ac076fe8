"""Makes a failing seed small: fewer faults and less work, as long as the same invariant breaks.

Delta debugging (Zeller & Hildebrandt 2002, ddmin) over the plan; then the story of what is left.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec

from chaos.sim.life import Outcome, Plan, live, plan
from chaos.sim.world import START_MS

RUNS_MAX: Final = 250
"""Lives tried for one seed: about a minute."""
STORY_LINES_MAX: Final = 90
"""The beginning and the end of a longer story are shown."""
_HEAD: Final = 25
_T = TypeVar("_T")


class Shrunk(msgspec.Struct, frozen=True):
    """The smallest plan found, its outcome with story, and how many lives it took."""

    plan: Plan
    outcome: Outcome
    runs: int
    faults_before: int
    work_before: int


class _Budget:
    def __init__(self) -> None:
        self.runs = 0

    def spend(self) -> bool:
        self.runs += 1
        return self.runs <= RUNS_MAX


def _ddmin(items: Sequence[_T], fails: Callable[[tuple[_T, ...]], bool]) -> tuple[_T, ...]:
    """A small part of `items` that still fails; 1-minimal unless the budget ran out."""
    left, parts = tuple(items), 2
    if not left or fails(()):
        return ()
    while len(left) > 1:
        size = -(-len(left) // parts)
        for start in range(0, len(left), size):
            rest = left[:start] + left[start + size :]
            if fails(rest):
                left, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(left):
                break
            parts = min(parts * 2, len(left))
    return left


def shrink(seed: int, plant: str = "") -> Shrunk | None:
    """None where the seed does not fail."""
    whole = plan(seed)
    violation = live(seed, plant=plant).violation
    if not violation:
        return None
    budget = _Budget()

    def fails(given: Plan) -> bool:
        return budget.spend() and live(seed, given=given, plant=plant).violation == violation

    few = _ddmin(whole.faults, lambda part: fails(Plan(whole.work, part)))
    work = _ddmin(whole.work, lambda part: fails(Plan(part, few)))
    few = _ddmin(few, lambda part: fails(Plan(work, part)))
    smallest = Plan(work, few)
    outcome = live(seed, given=smallest, plant=plant, keep_story=True)
    return Shrunk(smallest, outcome, budget.runs, len(whole.faults), len(whole.work))


def tell(outcome: Outcome) -> list[str]:
    """The story of what the violation is about: its jobs, terms and processes, faults and roles."""
    wanted = {"fault", *outcome.about}
    roles = {f"t{term}" for term in range(1, 1_000)}
    lines = [
        f"{line.at_ms - START_MS:>8} ms  {line.text}"
        for line in outcome.lines
        if wanted & set(line.about) or roles & set(line.about)
    ]
    if len(lines) <= STORY_LINES_MAX:
        return lines
    tail = STORY_LINES_MAX - _HEAD
    return [*lines[:_HEAD], f"     … {len(lines) - STORY_LINES_MAX} lines …", *lines[-tail:]]
