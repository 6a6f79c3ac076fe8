"""Looks at a running job's CPU time: has it used up its own, or is it idle?

The kernel has no limit on the CPU time of a group, so the launcher looks, no more often than the
job could reach its limit. Pure: the time, the CPU time and whether there was output are told.
"""

from __future__ import annotations

# The closest two looks may be: how far a job may overrun its CPU time, per CPU it can use.
LOOK_S_MIN = 0.01
# Idleness is looked at this often within its time, but not more often than makes sense.
_IDLE_LOOKS = 8
_IDLE_LOOK_S = (0.02, 1.0)
# Below this share of one CPU a job is idle: a loop around sleep(1) needs a tenth of it.
_IDLE_CPU_SHARE = 0.01
_NEVER = float("inf")


class Looks:
    """When to look next, and what a look finds."""

    def __init__(self, cpu_ms: int, idle_ms: int, cpus_at_once: float, now: float) -> None:
        """``cpus_at_once``: CPU seconds that the job can use in a second."""
        self._cpu_us, self._idle_s = cpu_ms * 1000, idle_ms / 1000
        self._rate = max(cpus_at_once, 0.01)
        self._cpu_at = now if cpu_ms else _NEVER
        self._idle_every_s = min(max(self._idle_s / _IDLE_LOOKS, _IDLE_LOOK_S[0]), _IDLE_LOOK_S[1])
        self._idle_at = now + self._idle_every_s if idle_ms else _NEVER
        self._looked_at = self._busy_at = now
        self._looked_us = 0
        self.output = False  # set by whoever sees output; a look takes it back
        if cpu_ms:
            self._plan_cpu_look(now, 0)

    @property
    def at(self) -> float:
        """When to look next."""
        return min(self._cpu_at, self._idle_at)

    @property
    def for_idleness(self) -> bool:
        """Output matters."""
        return self._idle_s > 0

    def look(self, now: float, used_us: int) -> str:
        """Why the job is to end now, or ""."""
        if self._cpu_us:
            if used_us >= self._cpu_us:
                return f"cpu: used more than {self._cpu_us // 1000} ms of CPU time"
            self._plan_cpu_look(now, used_us)
        if self._idle_s and now >= self._idle_at:
            self._idle_at = now + self._idle_every_s
            passed_us = (now - self._looked_at) * 1_000_000
            if self.output or used_us - self._looked_us >= passed_us * _IDLE_CPU_SHARE:
                self._busy_at = now
            self._looked_at, self._looked_us, self.output = now, used_us, False
            if now - self._busy_at >= self._idle_s:
                return f"idle: no output and next to no CPU time for {int(self._idle_s * 1000)} ms"
        return ""

    def _plan_cpu_look(self, now: float, used_us: int) -> None:
        left_s = (self._cpu_us - used_us) / 1_000_000
        self._cpu_at = now + max(left_s / self._rate, LOOK_S_MIN)


NO_LOOKS = Looks(0, 0, 1.0, 0.0)
