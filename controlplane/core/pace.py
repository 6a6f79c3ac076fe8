"""How often a leader writes to the ledger: at once while little happens, in batches under load.

An entry costs every reader of the ledger a fetch, a decoding and a wake-up, and the broker a
produce and those fetches: about 2 ms of CPU in all with three coordinators and one client, far
more than what one decision in it costs (docs/benchmarks.md). So where many attempts are out, and
their ends would come one by one, the next entry waits a little for company.
"""

from controlplane.core.bounds import ENTRY_FULL_DECISIONS, ENTRY_GAP_ATTEMPTS, ENTRY_GAP_MS_MAX


class EntryPace:
    """Of one leader. Times are epoch ms."""

    def __init__(self) -> None:
        self._last_ms = 0
        self.held_until_ms = 0
        """When to decide what was held back; 0 or past where nothing is."""

    def lead(self) -> None:
        """A new lead: its first decisions wait for nothing."""
        self._last_ms = self.held_until_ms = 0

    def appended(self, decisions: int, now_ms: int) -> None:
        """An entry of so many decisions is on its way."""
        self._last_ms = 0 if decisions >= ENTRY_FULL_DECISIONS else now_ms

    def holds(self, placed: int, now_ms: int) -> bool:
        """True where the next entry waits, with `placed` attempts out; `held_until_ms` says how
        long. A quiet ledger's next entry never waits."""
        due_ms = self._last_ms + entry_gap_ms(placed)
        if due_ms <= now_ms:
            return False
        self.held_until_ms = due_ms
        return True


def entry_gap_ms(placed: int) -> int:
    """From one entry to the next: none for few attempts, whose next steps wait for the last."""
    return min(ENTRY_GAP_MS_MAX, max(0, placed - ENTRY_GAP_ATTEMPTS) // 2)
