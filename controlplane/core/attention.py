"""When a coordinator reads the ledger without rest, and when a look ten times a second will do.

A leader knows its own entries when they are acknowledged (ADR 0015), and a standby is warm enough
when it is a tenth of a second behind: it reads on at the first sign of trouble, and a vote takes
longer than what is left to read.
"""

from typing import Final

from controlplane.core.election import Standing

ALARM_TIMEOUTS: Final = 2
"""How long a sign of trouble counts, in election timeouts: within that somebody leads again, or
nobody is heard and each stands."""


class Attention:
    """Of one coordinator. Times are epoch ms."""

    def __init__(self, timeout_ms: int) -> None:
        """`timeout_ms`: of the election."""
        self._alarm_ms = ALARM_TIMEOUTS * timeout_ms
        self._until_ms = 0

    def alarm(self, now_ms: int) -> None:
        """A process is gone, or asks for votes."""
        self._until_ms = now_ms + self._alarm_ms

    def needed(
        self, standing: Standing, leader: str, *, cold: bool, must_read: bool, now_ms: int
    ) -> bool:
        """`leader`: whom it follows, "" for nobody. `cold`: it never was at the ledger's end.
        `must_read`: see Coordinator."""
        follows = standing is Standing.FOLLOWER and leader != ""
        settled = follows or standing is Standing.LEADER
        return cold or must_read or not settled or now_ms < self._until_ms
