"""What a silence means: how long one may last here before a leader is held for dead (ADR 0014).

A timeout is configured for a machine that runs its processes in time. Where it does not, silences
that end by themselves grow to the timeout and beyond, and healthy leaders are deposed. So each
coordinator measures the silences that meant nothing, in which whoever was silent turned out to
live, and stretches its timeout within bounds. And a process that did not run itself must not take
what it did not hear for another's silence. Nothing here is about safety: the ledger's order is.
"""

from typing import Final

import msgspec

SILENCES_PER_TIMEOUT: Final = 2
"""A timeout is at least twice the longest harmless silence, the rule by which
`controlplane.priority` chose the defaults. Where silences stay below half of it, it stays."""
STRETCH_MAX: Final = 4
"""A timeout is stretched to this many times the configured one at most: longest silence seen at
normal priority beside 8 busy loops was 652 ms (facts/control.md), and a hung leader has to be
replaced on a crowded machine, too."""
MEMORY_MS: Final = 10_000
"""A silence is remembered for this long, and twice this at most: a crowded machine makes the next
one within it; one that is quiet again gets its configured timeout back."""
GRACE_HEARTBEATS: Final = 2
"""After we were late ourselves: one for what others say now, one for its way here and ours."""


class ElectionTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Periods in ms. `timeout_ms` is the lease, and the shortest silence that makes a follower
    stand; what is honest depends on the process's priority (facts: 700 ms without real-time)."""

    heartbeat_ms: int = 100
    timeout_ms: int = 1_000

    @property
    def stagger_ms(self) -> int:
        """Head start of each rank over the next after a hint: some round trips, never 0."""
        return max(self.heartbeat_ms // 2, 1)

    @property
    def successor_head_start_ms(self) -> int:
        """Of the successor that a leader names over everybody else: it was asked for by name, and
        may be late. One that is gone costs this much."""
        return 2 * self.heartbeat_ms


class Silence:
    """One coordinator's measure of silences, and of its own lateness. Times are ms."""

    def __init__(self, timing: ElectionTiming, now_ms: int) -> None:
        self._heartbeat_ms, self._configured_ms = timing.heartbeat_ms, timing.timeout_ms
        self._longest_ms = self._longest_before_ms = 0
        self._since_ms = now_ms
        self._due_ms = now_ms
        self._grace_given_ms = 0
        self.excuses = 0
        """How often this process was late enough to be given a grace."""

    # --- what others let us wait for ----------------------------------------------------------

    def heard(self, now_ms: int, *, since_ms: int) -> None:
        """A sign of life of one that had been silent `since_ms`, and lived."""
        self._grace_given_ms = 0
        if now_ms - self._since_ms >= MEMORY_MS:
            self._longest_before_ms = self._recent_ms(now_ms)
            self._longest_ms, self._since_ms = 0, now_ms
        self._longest_ms = max(self._longest_ms, now_ms - since_ms)

    def _recent_ms(self, now_ms: int) -> int:
        """Longest of this period, forgotten where nothing was heard for a whole one since."""
        return self._longest_ms if now_ms - self._since_ms < 2 * MEMORY_MS else 0

    def timeout_ms(self, now_ms: int) -> int:
        """The configured timeout, or what harmless silences ask for, within the bounds."""
        age_ms = now_ms - self._since_ms
        before_ms = self._longest_before_ms if age_ms < MEMORY_MS else 0
        wanted_ms = SILENCES_PER_TIMEOUT * max(self._recent_ms(now_ms), before_ms)
        return min(max(wanted_ms, self._configured_ms), STRETCH_MAX * self._configured_ms)

    # --- what we let others wait for ----------------------------------------------------------

    def wake_by(self, due_ms: int) -> None:
        """When this process asked to be woken."""
        self._due_ms = due_ms

    def grace_ms(self, now_ms: int) -> int:
        """How long to listen before anything is concluded from silence; 0 where we were in time.

        All graces of one silence together are no longer than the longest timeout."""
        if now_ms - self._due_ms <= self._heartbeat_ms:
            return 0
        left_ms = STRETCH_MAX * self._configured_ms - self._grace_given_ms
        grace_ms = max(0, min(GRACE_HEARTBEATS * self._heartbeat_ms, left_ms))
        self._grace_given_ms += grace_ms
        self.excuses += grace_ms > 0
        return grace_ms
