"""The whole pool as the ledger tells it: a `PoolState` read up to the present end, on demand."""

from collections.abc import Callable

from dataplane.core.state import PoolState
from dataplane.core.validity import Verdict
from dataplane.ledger import read_ledger
from dataplane.snapshots import Recovered, recover, require_start
from idl.ledger import LedgerEntry
from idl.settings import ClusterSettings

EntrySeen = Callable[[int, LedgerEntry, Verdict], None]


class LedgerView:
    """Folds the ledger. `advance` reads what is new since the last call.

    `from_snapshot`: the first call starts from the newest good snapshot, where a long ledger has
    one; `seen` is then not told what came before. Otherwise the whole ledger is folded.
    """

    def __init__(self, settings: ClusterSettings, *, from_snapshot: bool = False) -> None:
        self.settings = settings
        self.state = PoolState()
        self.recovered: Recovered | None = None
        self._from_snapshot = from_snapshot

    @property
    def leader(self) -> str:
        """Who started the newest term, by the ledger; "" before the first term."""
        return self.state.gate.leader

    def begin(self) -> PoolState:
        """The state before the first `advance`. Raises LedgerTruncatedError: the ledger's start
        was deleted and there is no snapshot to begin with, or none is wanted."""
        kafka, pool = self.settings.kafka, self.settings.pool
        if not self._from_snapshot:
            require_start(kafka, pool)
        elif self.recovered is None:
            self.recovered = recover(kafka, pool)
            self.state = self.recovered.state
        return self.state

    def advance(self, seen: EntrySeen | None = None) -> int:
        """Reads up to the present end; returns how many entries were new.

        `seen` is told each entry, void ones included, after it was applied. Raises
        BrokerUnavailableError, LedgerCorruptError, LedgerTruncatedError (its start was deleted),
        InvariantBrokenError (the ledger contradicts itself).
        """
        count = 0
        kafka, pool = self.settings.kafka, self.settings.pool
        if self.state.next_offset == 0:
            self.begin()
        for offset, entry in read_ledger(kafka, pool, self.state.next_offset):
            verdict = self.state.apply(offset, entry)
            count += 1
            if seen is not None:
                seen(offset, entry, verdict)
        return count
