"""The outside observer: reads the ledger as anybody may, judges each entry, writes the history."""

import threading

from chaos.history import EntryRead, Hashed, ObserverBroke, Recorder
from dataplane.core.state import PoolState
from dataplane.ledger import LedgerReader
from idl.errors import InvariantBrokenError, PlatformFaultError
from idl.jobs import SourceRef
from idl.ledger import Cancelled, DeadLettered, Finished, Ingested, LedgerEntry, Rejected
from idl.settings import ClusterSettings


class Observer:
    """Follows the ledger until it is closed. Properties may be read from any thread."""

    def __init__(self, settings: ClusterSettings, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self._state = PoolState()
        self._ended: set[str] = set()
        self._decided: set[SourceRef] = set()
        self._reader = LedgerReader(
            settings.kafka, settings.pool, 0, self._take, on_error=self._broke
        )
        self.broken = ""
        self._reader.start()

    def _take(self, batch: list[tuple[int, LedgerEntry]]) -> None:
        now = self._recorder.now_ms()
        for offset, entry in batch:
            try:
                with self._lock:
                    verdict = self._state.apply(offset, entry)
            except InvariantBrokenError as error:
                self._recorder.add(EntryRead(at_ms=now, offset=offset, valid=True, entry=entry))
                self._broke(error)
                continue
            self._recorder.add(
                EntryRead(
                    at_ms=now, offset=offset, valid=verdict.valid, reason=verdict.reason,
                    entry=entry,
                )
            )  # fmt: skip
            if verdict.valid:
                self._note(entry)
        self._reader.done(len(batch))

    def _note(self, entry: LedgerEntry) -> None:
        with self._lock:
            for decision in entry.decisions:
                if isinstance(decision, Finished | DeadLettered | Cancelled):
                    self._ended.add(decision.job)
                elif isinstance(decision, Ingested | Rejected):
                    self._decided.add(decision.source)

    def _broke(self, error: PlatformFaultError | InvariantBrokenError) -> None:
        self.broken = self.broken or str(error)
        self._recorder.add(ObserverBroke(at_ms=self._recorder.now_ms(), error=str(error)))

    @property
    def leader(self) -> str:
        """Who started the newest term."""
        return self._state.gate.leader

    @property
    def term(self) -> int:
        """The newest term."""
        return self._state.gate.term

    @property
    def next_offset(self) -> int:
        """One more than the last offset read."""
        return self._state.next_offset

    @property
    def live(self) -> int:
        """Jobs that have not ended."""
        return len(self._state.jobs)

    def ended(self) -> set[str]:
        """Jobs that have ended."""
        with self._lock:
            return set(self._ended)

    def decided(self) -> set[SourceRef]:
        """Records in queues that were ingested or rejected."""
        with self._lock:
            return set(self._decided)

    def enforced(self) -> frozenset[str]:
        """Limits (`LimitName`) that every node seen can hold."""
        with self._lock:
            offers = [node.enforces for node in self._state.nodes.values()]
        return frozenset.intersection(*map(frozenset, offers)) if offers else frozenset()

    def hash_now(self) -> None:
        """Writes the state hash of this moment into the history."""
        with self._lock:
            self._recorder.add(
                Hashed(at_ms=self._recorder.now_ms(), by="observer",
                       next_offset=self._state.next_offset, state_hash=self._state.state_hash())
            )  # fmt: skip

    def close(self) -> None:
        """Stops reading."""
        self._reader.close()
