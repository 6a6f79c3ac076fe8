"""When an agent tells its leader what changed: at once while little happens, in batches under load.

A status costs agent and leader a wake-up, a signature and a message each, more than what is in it.
"""

from typing import Final

STATUS_GAP_MS: Final = 10
"""At most a hundred statuses a second of one node, however many short attempts start there."""
STATUS_WAIT_MS: Final = 25
"""News that nobody waits for: that an intent arrived (asked for again after NodeTiming.resend_ms)
and that an attempt ended (its result tells). Most attempts start within this time."""


class StatusPace:
    """Of one agent. Times are monotonic ms."""

    def __init__(self) -> None:
        self._last_ms = -STATUS_GAP_MS
        self._due_ms: int | None = None

    def changed(self, now_ms: int, *, urgent: bool) -> int | None:
        """Something changed. When to send, where that is sooner than what was said before."""
        wait_ms = 0 if urgent else STATUS_WAIT_MS
        due_ms = max(now_ms + wait_ms, self._last_ms + STATUS_GAP_MS)
        if self._due_ms is not None and self._due_ms <= due_ms:
            return None
        self._due_ms = due_ms
        return due_ms

    def sent(self, now_ms: int) -> None:
        """All that changed has been told."""
        self._last_ms, self._due_ms = now_ms, None
