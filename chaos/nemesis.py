"""When which fault happens, planned from a seed. Pure: whom it hits is chosen when it happens,
because who leads then is not known before; the dice for that choice are planned too."""

import random
from collections.abc import Sequence
from typing import Final

import msgspec

from chaos.scenario import FaultSpec, Scenario
from idl.units import parse_ms

CALM_S: Final = 1.0
"""Nothing happens in the first second of load: the first gap is measured against a working
cluster."""


class PlannedFault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault. `dice` seeds the choice of its targets."""

    number: int
    at_s: float
    lasts_s: float
    spec: FaultSpec
    dice: int


def plan(scenario: Scenario, seed: int, duration_s: float) -> list[PlannedFault]:
    """Every fault of the run, in order of time."""
    found: list[tuple[float, float, FaultSpec, int]] = []
    for index, spec in enumerate(scenario.nemesis):
        dice = random.Random(f"nemesis/{seed}/{index}")
        every = parse_ms(spec.every) / 1000
        spread = every * spec.jitter
        at_s = parse_ms(spec.first) / 1000 if spec.first else dice.uniform(CALM_S, CALM_S + every)
        while at_s < duration_s:
            found.append((at_s, parse_ms(spec.lasts) / 1000, spec, dice.getrandbits(32)))
            at_s += max(0.1, dice.uniform(every - spread, every + spread))
    found.sort(key=lambda fault: fault[0])
    return [
        PlannedFault(number=number, at_s=at_s, lasts_s=lasts_s, spec=spec, dice=dice)
        for number, (at_s, lasts_s, spec, dice) in enumerate(found, 1)
    ]


def choose(
    spec: FaultSpec,
    dice_seed: int,
    coordinators: Sequence[str],
    agents: Sequence[str],
    leader: str,
    busy: frozenset[str],
) -> tuple[str, ...]:
    """Whom the fault hits; () where everybody meant is under a fault already."""
    dice = random.Random(dice_seed)
    free_coordinators = [name for name in coordinators if name not in busy]
    free_agents = [name for name in agents if name not in busy]
    standbys = [name for name in free_coordinators if name != leader]
    few = (len(coordinators) - 1) // 2
    match spec.target:
        case "leader":
            found = [leader] if leader in free_coordinators else []
        case "standby":
            found = standbys
        case "coordinator":
            found = free_coordinators
        case "agent":
            found = free_agents
        case "any":
            found = free_coordinators + free_agents
        case "broker":
            return () if "broker" in busy else ("broker",)
        case "minority" | "majority":
            count = few if spec.target == "minority" else few + 1
            enough = len(free_coordinators) >= count > 0
            return tuple(sorted(dice.sample(free_coordinators, count))) if enough else ()
        case "coordinators":
            return tuple(free_coordinators)
        case "agents":
            return tuple(free_agents)
    return (dice.choice(found),) if found else ()
