"""The scheduling priority that this process really got, and the election timing it can honour.

Measured beside 8 busy loops on 2 cores (facts/control.md): heartbeat gaps reach 652 ms at normal
priority and 142 ms at nice −20. A timeout below that would depose healthy leaders.
"""

import os
from typing import Final, NamedTuple

from idl.settings import ElectionSettings

NICE_WANTED: Final = -15
"""Above ordinary work, below what the kernel and sshd need to stay reachable."""


class Timing(NamedTuple):
    """Election timing in ms, and why."""

    heartbeat_ms: int
    timeout_ms: int
    priority: str


_RAISED: Final = Timing(heartbeat_ms=40, timeout_ms=300, priority="nice")
_NORMAL: Final = Timing(heartbeat_ms=100, timeout_ms=1_000, priority="normal")


def raise_priority() -> bool:
    """Asks for NICE_WANTED (setpriority(2), needs CAP_SYS_NICE); False where it was refused."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE_WANTED)
    except PermissionError:
        return False
    return True


def choose_timing(raised: bool, settings: ElectionSettings) -> Timing:
    """Defaults for the priority we got; what the operator set wins."""
    default = _RAISED if raised else _NORMAL
    return Timing(
        heartbeat_ms=settings.heartbeat_ms or default.heartbeat_ms,
        timeout_ms=settings.timeout_ms or default.timeout_ms,
        priority=default.priority,
    )
