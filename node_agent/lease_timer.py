"""Wakes the agent's core when the next lease of an exclusive attempt ends (ADR 0011).

The core looks at the clock at every event, heartbeats among them; this is for being in time.
"""

import asyncio
from collections.abc import Callable

from node_agent.state import boot_ms


class LeaseTimer:
    """One timer; `due` is called on the running loop."""

    def __init__(self, due: Callable[[], None]) -> None:
        self._due = due
        self._end_ms = 0
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, end_ms: int) -> None:
        """The next lease ends then (CLOCK_BOOTTIME); 0: none does."""
        if end_ms == self._end_ms:
            return
        self.cancel()
        self._end_ms = end_ms
        if end_ms:
            delay_s = max(end_ms - boot_ms(), 0) / 1000
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def cancel(self) -> None:
        """No more calls."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._end_ms = 0  # the loop's clock may be a little ahead: then it is set again
        self._due()
