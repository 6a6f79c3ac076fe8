"""The whole pool as the ledger tells it: a `PoolState` read up to the present end, on demand."""

from collections.abc import Callable

from dataplane.core.state import PoolState
from dataplane.core.validity import Verdict
from dataplane.ledger import read_ledger
from idl.ledger import LedgerEntry
from idl.settings import ClusterSettings

EntrySeen = Callable[[int, LedgerEntry, Verdict], None]


class LedgerView:
    """Folds the ledger. `advance` reads what is new since the last call."""

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.state = PoolState()

    @property
    def leader(self) -> str:
        """Who started the newest term, by the ledger; "" before the first term."""
        return self.state.gate.leader

    def advance(self, seen: EntrySeen | None = None) -> int:
        """Reads up to the present end; returns how many entries were new.

        `seen` is told each entry, void ones included, after it was applied. Raises
        BrokerUnavailableError, LedgerCorruptError, InvariantBrokenError (the ledger contradicts
        itself).
        """
        count = 0
        kafka, pool = self.settings.kafka, self.settings.pool
        for offset, entry in read_ledger(kafka, pool, self.state.next_offset):
            verdict = self.state.apply(offset, entry)
            count += 1
            if seen is not None:
                seen(offset, entry, verdict)
        return count
