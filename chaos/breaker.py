"""Carries the planned faults out, heals them, and sees whether anything died of itself.

One thread does it all: a fault, its healing and the look at who is alive never race.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from chaos.faults.kinds import KINDS, Fault
from chaos.faults.world import World, unavailable
from chaos.history import FaultBegan, FaultHealed, FaultSkipped, ProcessEnded, Recorder
from chaos.nemesis import PlannedFault, choose
from chaos.scenario import NETWORK_FAULTS, PROCESS_FAULTS
from idl.errors import OutriderError
from outrider.local.process import log_tail

TICK_S: Final = 0.05
LOG_LINES: Final = 5
DEADLY: Final = frozenset({"kill", "stop"})


class _Open(msgspec.Struct):
    number: int
    kind: str
    targets: tuple[str, ...]
    fault: Fault
    until: float


def _group(kind: str) -> str:
    """Faults of one group are not laid upon each other: their healings would undo one another."""
    if kind in PROCESS_FAULTS:
        return "process"
    return "network" if kind in NETWORK_FAULTS else kind


class Breaker:
    """The nemesis at work. `began` and `open` are for the progress line."""

    def __init__(self, world: World, recorder: Recorder) -> None:
        self._world = world
        self._recorder = recorder
        self._open: list[_Open] = []
        self._reasons: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()
        self._stopping = threading.Event()
        self._down: set[str] = set()
        """Down by our doing, or told already: not to be told (again), only to be started."""
        self.unhealed: list[str] = []
        self.began = 0
        self.skipped = 0

    @property
    def open(self) -> list[str]:
        """What is broken now, in words."""
        return [f"{one.kind} {'+'.join(one.targets)}" for one in list(self._open)]

    def run(self, plan: Sequence[PlannedFault], duration_s: float) -> None:
        """Follows the plan for `duration_s` or until `stop`, then heals everything."""
        start = time.monotonic()
        todo = list(plan)
        try:
            while not self._stopping.is_set() and time.monotonic() - start < duration_s:
                self.tick(todo, time.monotonic() - start)
                self._stopping.wait(TICK_S)
        finally:
            self.heal_all()

    def tick(self, todo: list[PlannedFault], now: float) -> None:
        """Heals and begins (and takes from `todo`) what is due `now` s after the load began."""
        self._heal_due(now)
        while todo and todo[0].at_s <= now:
            self._begin(todo.pop(0), now)
        self.look()

    def stop(self) -> None:
        """Ends `run` soon; it heals on its way out."""
        self._stopping.set()

    def heal_all(self) -> None:
        """Heals whatever is open. Idempotent."""
        self._heal_due(float("inf"))

    def look(self) -> None:
        """Notes processes that ended without our doing, and starts them again as a supervisor
        would (systemd, Kubernetes), so that the run goes on."""
        harmed = {name for one in self._open if one.kind in DEADLY for name in one.targets}
        for name in (*self._world.coordinators, *self._world.agents):
            if name in harmed:
                continue
            if self._world.alive(name):
                self._down.discard(name)
                continue
            if name not in self._down:
                self._tell_ended(name)
            if self._world.cluster is not None:
                with contextlib.suppress(OutriderError, OSError):  # it is tried again
                    self._world.restart(name)

    def _tell_ended(self, name: str) -> None:
        self._down.add(name)
        log = self._world.log(name)
        tail = log_tail(log, LOG_LINES) if log else ""
        self._recorder.add(ProcessEnded(at_ms=self._recorder.now_ms(), process=name, log=tail))

    def _begin(self, planned: PlannedFault, now: float) -> None:
        spec, world = planned.spec, self._world
        reason = self._reasons.setdefault(spec.fault, unavailable(world, spec.fault))
        if reason:
            self._skip(spec.fault, reason)
            return
        busy = frozenset(
            name
            for one in self._open
            if _group(one.kind) == _group(spec.fault)
            for name in one.targets
        )
        leader = world.leader()
        targets = choose(spec, planned.dice, world.coordinators, world.agents, leader, busy)
        if not targets:
            self._skip(spec.fault, f"whom it was to hit ({spec.target}) was under another fault")
            return
        fault = KINDS[spec.fault](world, spec, targets, planned.dice)
        at_ms = self._recorder.now_ms()
        one = _Open(planned.number, spec.fault, targets, fault, now + planned.lasts_s)
        self._open.append(one)
        try:
            detail = fault.begin()
        except (OutriderError, OSError) as error:
            self._skip(spec.fault, str(error))
            healed = self._heal(one)
            if healed.error:
                self._recorder.add(healed)
            return
        self.began += 1
        self._recorder.add(
            FaultBegan(at_ms=at_ms, fault=planned.number, kind=spec.fault, targets=targets,
                       detail=detail, means=fault.means, hit_leader=leader in targets)
        )  # fmt: skip

    def _skip(self, kind: str, reason: str) -> None:
        self.skipped += 1
        if (kind, reason) not in self._told:
            self._told.add((kind, reason))
            self._recorder.add(
                FaultSkipped(at_ms=self._recorder.now_ms(), kind=kind, reason=reason)
            )

    def _heal_due(self, now: float) -> None:
        for one in [one for one in self._open if one.until <= now]:
            self._recorder.add(self._heal(one))

    def _heal(self, one: _Open) -> FaultHealed:
        """Heals it, and whatever comes of that: the others are healed and the run goes on."""
        detail = error = ""
        try:
            detail = one.fault.heal() or ""
        except Exception as raised:  # noqa: BLE001 - one healing must not keep others from theirs
            error = f"{one.kind} of {' '.join(one.targets)}: {raised or type(raised).__name__}"
            self.unhealed.append(error)
            if one.kind in DEADLY:
                self._down.update(one.targets)
        self._open.remove(one)
        now = self._recorder.now_ms()
        return FaultHealed(at_ms=now, fault=one.number, detail=detail, error=error)
