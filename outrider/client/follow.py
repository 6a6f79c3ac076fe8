"""Following the ledger once per client: one tail, one gate, any number of jobs.

Validity is decided by `TermGate`, as everywhere. A gate normally starts at the first entry; a
client that only follows jobs it is about to submit starts at the end, so its gate is seeded from
the last entries (`seed_gate`) instead of the whole history.
"""

import threading
from collections.abc import Iterable
from typing import Final

from dataplane.core.validity import TermGate
from dataplane.ledger import LedgerReader, read_ledger
from dataplane.tail import watermarks
from idl.errors import OutriderError, PlatformFaultError
from idl.ids import PoolName
from idl.jobs import SourceRef
from idl.ledger import Decision, Ingested, LedgerEntry, Rejected
from idl.settings import ClusterSettings, KafkaSettings
from idl.topics import TopicNames
from outrider.client.progress import JobProgress, job_of

SEED_ENTRIES: Final = 512
"""Entries looked at to seed a gate: many times what a deposed leader can still have in flight."""
SEED_GROWTH: Final = 8


def ledger_end(kafka: KafkaSettings, pool: PoolName) -> int:
    """The next ledger offset to be written. Raises BrokerUnavailableError."""
    return watermarks(kafka, TopicNames(kafka.prefix).ledger(pool))[0][1]


def seed_gate(kafka: KafkaSettings, pool: PoolName, end: int) -> TermGate:
    """A gate that judges entries from `end` on, without reading all that came before.

    A leader appends its second entry only after it read its first, `TermStarted`, back as valid.
    So the newest term that shows an entry with seq > 1 was really started, by that entry's
    leader, and a newer one shows itself by a `TermStarted` of its own. Where the look back holds
    nothing but first entries it is widened, at last to the whole ledger.
    """
    span = SEED_ENTRIES
    while True:
        start = max(0, end - span)
        gate = TermGate()
        entries = read_ledger(kafka, pool, start, end)
        if start == 0:
            for offset, entry in entries:
                gate.judge(offset, entry)
            return gate
        if _seed(gate, [entry for _, entry in entries]):
            gate.next_offset = end
            return gate
        span *= SEED_GROWTH


def _seed(gate: TermGate, entries: list[LedgerEntry]) -> bool:
    newest = max((entry.term for entry in entries), default=0)
    for entry in entries:
        if entry.term == newest and entry.seq > 1:
            gate.term, gate.leader, gate.incarnation = newest, entry.leader, entry.incarnation
            gate.seq = max(gate.seq, entry.seq)
    return gate.seq > 0


class Life:
    """What the ledger tells of one id: of the newest job that bore it, or of refusals alone."""

    def __init__(self) -> None:
        self.decisions: list[tuple[int, Decision]] = []

    def take(self, at_ms: int, decision: Decision) -> None:
        """The next decision about this id."""
        if isinstance(decision, Ingested):
            self.decisions.clear()
        self.decisions.append((at_ms, decision))


class Follower:
    """Tails the ledger on a thread of its own and moves the jobs it was asked to watch.

    Safe from any thread. After a failure of the tail every job not ended fails with it.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        """Connects; from here on no decision is missed. Raises BrokerUnavailableError."""
        self._kafka, self._pool = settings.kafka, settings.pool
        self._lock = threading.Lock()
        self._jobs: dict[str, list[JobProgress]] = {}
        """Those that have not ended; several where an id was submitted again."""
        self._failure: PlatformFaultError | None = None
        self.stalled = ""
        """Why no broker answers right now; empty while one does."""
        start = ledger_end(self._kafka, self._pool)
        self._gate = seed_gate(self._kafka, self._pool, start)
        self._reader = LedgerReader(
            self._kafka,
            self._pool,
            start,
            self._read,
            on_error=self._fail,
            on_stall=self._stall,
        )
        self._reader.start()

    def watch(self, job: str) -> JobProgress:
        """Follows a job that is about to be submitted; what is told of it waits for `begin`."""
        progress = JobProgress(job)
        with self._lock:
            self._add(progress)
        return progress

    def begin(self, submitted: Iterable[tuple[JobProgress, SourceRef]]) -> None:
        """The submissions are in Kafka, as these records. Raises nothing: a job fails instead."""
        begun = []
        with self._lock:
            for progress, source in submitted:
                progress.source = source
                self._release(progress)
                begun.append(progress)
        self._follow_the_first(begun)

    def _add(self, progress: JobProgress) -> None:
        progress.held = []
        if self._failure is not None:
            progress.fail(self._failure)
        else:
            self._jobs.setdefault(progress.job, []).append(progress)

    def forget(self, progress: JobProgress) -> None:
        """Follows a job no longer: its memory is given back."""
        with self._lock:
            self._drop(progress)

    def _drop(self, progress: JobProgress) -> None:
        followed = self._jobs.get(progress.job, [])
        if progress in followed:
            followed.remove(progress)
        if not followed:
            self._jobs.pop(progress.job, None)

    def recall(self, job: str) -> JobProgress | None:
        """Follows a job from its first decision on: reads the whole ledger once.

        None where the ledger does not know it. Raises BrokerUnavailableError, LedgerCorruptError.
        """
        with self._lock:
            for known in self._jobs.get(job, ()):
                if known.source is not None or known.phase is not None:
                    return known  # else another thread is finding out whether there is such a job
            progress = JobProgress(job)
            self._add(progress)
        try:
            self._catch_up([progress])
        except BaseException:
            self.forget(progress)
            raise
        if progress.phase is None and not progress.refuse():
            self.forget(progress)
            return None
        return progress

    def _follow_the_first(self, progresses: list[JobProgress]) -> None:
        """A submission that was refused because its id is taken: the job is the first one's. One
        reading of the ledger finds them all, and each is looked for once."""
        with self._lock:
            taken = [p for p in progresses if p.taken and not p.found and p.held is None]
            for progress in taken:
                progress.found = True
        if not taken:
            return
        try:
            self._catch_up(taken)
        except OutriderError as error:
            for progress in taken:
                progress.fail(error)
        for progress in taken:
            if progress.phase is None:  # longer ago than the ledger goes back
                progress.refuse()
            if progress.ended.done():
                self.forget(progress)

    def _catch_up(self, progresses: list[JobProgress]) -> None:
        """Reads what the ledger knows of their jobs, then what was decided meanwhile."""
        with self._lock:
            for progress in progresses:
                progress.restart()
        lives = {progress.job: Life() for progress in progresses}
        gate, start = past_gate(self._kafka, self._pool)
        for offset, entry in read_ledger(self._kafka, self._pool, start):
            if gate.judge(offset, entry).valid:
                for decision in entry.decisions:
                    if (life := lives.get(job_of(decision))) is not None:
                        life.take(entry.at_ms, decision)
        with self._lock:
            for progress in progresses:
                progress.next_offset = gate.next_offset
                for at_ms, decision in lives[progress.job].decisions:
                    progress.apply(at_ms, decision)
                self._release(progress)

    def _release(self, progress: JobProgress) -> None:
        """Takes what was decided while it was held."""
        held, progress.held = progress.held or [], None
        for offset, at_ms, decision in held:
            self._apply(progress, offset, at_ms, decision)

    def _read(self, entries: list[tuple[int, LedgerEntry]]) -> None:
        refused: list[JobProgress] = []
        for offset, entry in entries:
            verdict = self._gate.judge(offset, entry)
            if verdict.reason == "term_not_started":
                # Either a zombie, or the gate was seeded wrongly: the whole ledger knows.
                self._gate = _gate_from_start(self._kafka, self._pool, offset)
                verdict = self._gate.judge(offset, entry)
            if verdict.valid:
                with self._lock:
                    for decision in entry.decisions:
                        followed = self._jobs.get(job_of(decision), ())
                        for progress in tuple(followed):
                            self._apply(progress, offset, entry.at_ms, decision)
                        if isinstance(decision, Rejected):
                            refused += followed
        self._follow_the_first(refused)
        self._reader.done(len(entries))

    def _apply(self, progress: JobProgress, offset: int, at_ms: int, decision: Decision) -> None:
        if progress.held is not None:
            progress.held.append((offset, at_ms, decision))
        elif offset >= progress.next_offset:
            progress.apply(at_ms, decision)
            if progress.ended.done():
                self._drop(progress)

    def _fail(self, error: PlatformFaultError) -> None:
        with self._lock:
            self._failure = error
            waiting = [p for followed in self._jobs.values() for p in followed]
            self._jobs.clear()
        for progress in waiting:
            progress.fail(error)

    def _stall(self, stalled: bool, reason: str) -> None:
        self.stalled = reason if stalled else ""

    def close(self) -> None:
        """Stops following; jobs not ended never resolve. Idempotent."""
        self._reader.close()


def past_gate(kafka: KafkaSettings, pool: PoolName) -> tuple[TermGate, int]:
    """A gate for all that the ledger still holds, and where that begins.

    Where its beginning was deleted (a snapshot stands for it), by the first entries that are left:
    of the newest term among them that was really started.
    """
    start = watermarks(kafka, TopicNames(kafka.prefix).ledger(pool))[0][0]
    gate = TermGate()
    if start:
        first = [entry for _, entry in read_ledger(kafka, pool, start, start + SEED_ENTRIES)]
        if _seed(gate, first):
            of_it = (entry.seq for entry in first if entry.term == gate.term)
            gate.seq = min(of_it) - 1
        gate.next_offset = start
    return gate, start


def _gate_from_start(kafka: KafkaSettings, pool: PoolName, end: int) -> TermGate:
    gate = TermGate()
    for offset, entry in read_ledger(kafka, pool, 0, end):
        gate.judge(offset, entry)
    return gate
