"""The scheduling priority that this process really got, and the election timing it can honour.

Measured beside 8 busy loops on 2 cores (facts/control.md): heartbeat gaps reach 652 ms at normal
priority, 142 ms at nice −20 and 61 ms under SCHED_RR. A timeout below the gaps of its own class
would depose healthy leaders, so the class that the kernel grants decides the defaults.
"""

import os
from typing import Final, Literal, NamedTuple

from idl.settings import ElectionSettings

REALTIME_PRIORITY: Final = 10
"""Of SCHED_RR (1–99): any is above all ordinary processes; kernel threads stay far above."""
NICE_WANTED: Final = -15
"""Above ordinary work, below what the kernel and sshd need to stay reachable."""
REALTIME_CPUS_MIN: Final = 2
"""On a single CPU a busy real-time leader would starve the broker that it waits for."""

PriorityName = Literal["realtime", "nice", "normal"]


class Timing(NamedTuple):
    """Election timing in ms, and why."""

    heartbeat_ms: int
    timeout_ms: int
    priority: PriorityName


_DEFAULTS: Final[dict[PriorityName, Timing]] = {
    "realtime": Timing(heartbeat_ms=30, timeout_ms=160, priority="realtime"),
    "nice": Timing(heartbeat_ms=40, timeout_ms=300, priority="nice"),
    "normal": Timing(heartbeat_ms=100, timeout_ms=1_000, priority="normal"),
}
"""Timeouts are twice the longest gap measured (two and a half times under SCHED_RR), and at least
five heartbeats."""


def raise_priority(*, realtime: bool = True) -> PriorityName:
    """The best class the kernel grants: SCHED_RR (sched(7); root, CAP_SYS_NICE or RLIMIT_RTPRIO),
    else NICE_WANTED, else what it was. Threads started later inherit it.

    The kernel leaves ordinary processes 5 % of every CPU whatever we do (sched_rt_runtime_us).
    """
    if realtime and (os.cpu_count() or 1) >= REALTIME_CPUS_MIN:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
        except OSError:
            realtime = False  # not permitted, or a cgroup without real-time budget
        else:
            return "realtime"
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE_WANTED)
    except PermissionError:
        return "normal"
    return "nice"


def choose_timing(got: PriorityName, settings: ElectionSettings) -> Timing:
    """Defaults for the priority we got; what the operator set wins."""
    default = _DEFAULTS[got]
    return Timing(
        heartbeat_ms=settings.heartbeat_ms or default.heartbeat_ms,
        timeout_ms=settings.timeout_ms or default.timeout_ms,
        priority=default.priority,
    )
