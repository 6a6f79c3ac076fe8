"""Clocks of simulated hosts: the wall clock jumps and is skewed, the monotonic one drifts.

As in the product, a process takes epoch ms from the wall once, when it starts, and adds monotonic
time from then on: a jump reaches its cores with its next restart, and its envelopes at once.
"""

from chaos.sim.world import World

MILLION = 1_000_000


class Wall:
    """The wall clock of one host."""

    def __init__(self, world: World, skew_ms: int) -> None:
        self._world = world
        self.skew_ms = skew_ms
        self.jumps: dict[int, int] = {}
        """Jumps not mended yet, in ms, by number of the fault."""

    @property
    def now_ms(self) -> int:
        """Epoch ms as this host believes."""
        return self._world.now + self.skew_ms + sum(self.jumps.values())


class ProcessClock:
    """Epoch ms that never go back within one process. `drift_ppm`: how wrong its seconds are."""

    def __init__(self, world: World, wall: Wall, drift_ppm: int) -> None:
        self._world = world
        self._started = world.now
        self._epoch = wall.now_ms
        self._drift_ppm = drift_ppm

    @property
    def now_ms(self) -> int:
        """What the driver hands to a core as `now_ms`."""
        elapsed = self._world.now - self._started
        return self._epoch + elapsed + elapsed * self._drift_ppm // MILLION
