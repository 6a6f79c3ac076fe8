"""A pool's state: the one fold of its ledger, for leader, standbys, CLI and audit alike.

`PoolState.apply(offset, entry)` is the only thing that changes what a state says. Two readers that
applied the same prefix of the log hold equal states (`state_hash`), whatever else they saw.
Every decision costs O(1) or O(log n). A valid entry that does not fit the state is our bug and
raises InvariantBrokenError: history must not be guessed at.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from dataplane.core.due import Due, DueHeap
from dataplane.core.jobs import (
    ENDED,
    PLACED,
    WAITING,
    Cause,
    EndedJob,
    Job,
    Phase,
    ended_job,
    shorten,
)
from dataplane.core.nodes import Node, Reservation
from dataplane.core.pending import PendingIndex
from dataplane.core.validity import TermGate, Verdict
from idl import ledger
from idl.errors import InvariantBrokenError
from idl.jobs import SourceRef
from idl.ledger import LedgerEntry
from idl.limits import ENDED_JOBS_KEPT
from idl.members import Members
from idl.records import AttemptStory, CancelJob, DeadLetter, DrainNode

TERMS_KEPT: Final = 64
"""Terms remembered for people: who led lately, and why the role moved."""
LOST_NODES_KEPT: Final = 1_000
"""Lost nodes remembered (their drain order, their name in `explain`); oldest go first."""
DIGEST_BYTES: Final = 16
"""Of digest and state hash: against chance alone, no foe is near."""
DUPLICATE_CODE: Final = "duplicate"
"""Code of a Rejected that is not dead-lettered: the first submission of that id counts."""


class TermRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One term of the ledger."""

    term: int
    leader: str
    incarnation: int
    offset: int
    at_ms: int
    why: str


class QueueCounters(msgspec.Struct, kw_only=True):
    """One queue in numbers. `pending` includes backing-off jobs, `placed` assigned and running."""

    pending: int = 0
    placed: int = 0
    running: int = 0
    ingested: int = 0
    rejected: int = 0
    finished: int = 0
    dead: int = 0
    cancelled: int = 0

    @property
    def live(self) -> int:
        """Jobs held in memory."""
        return self.pending + self.placed

    def count(self, phase: Phase, by: int) -> None:
        """Adds `by` to what a job of `phase` counts as."""
        if phase in WAITING:
            self.pending += by
        elif phase in PLACED:
            self.placed += by
            if phase is Phase.RUNNING:
                self.running += by
        elif phase is Phase.FINISHED:
            self.finished += by
        elif phase is Phase.DEAD:
            self.dead += by
        elif phase is Phase.CANCELLED:
            self.cancelled += by


class _At(NamedTuple):
    offset: int
    at_ms: int
    entry: LedgerEntry


def dead_letter_key(source: SourceRef) -> str:
    """Key of a refused submission's dead letter; '/' keeps it apart from any job id."""
    return f"{source.topic}/{source.partition}/{source.offset}"


class PoolState:
    """See the module. Public attributes are for reading."""

    def __init__(self) -> None:
        self.gate = TermGate()
        self.terms: deque[TermRecord] = deque(maxlen=TERMS_KEPT)
        self.void_counts: dict[str, int] = {}
        self.at_ms = 0
        """`at_ms` of the last valid entry."""
        self.jobs: dict[str, Job] = {}
        """Live jobs by id."""
        self.ended: dict[str, EndedJob] = {}
        """Ended jobs by id, oldest first, at most ENDED_JOBS_KEPT."""
        self.nodes: dict[str, Node] = {}
        self.orphaning: dict[str, None] = {}
        """Lost nodes whose attempts are not all released yet."""
        self.queues: dict[str, QueueCounters] = {}
        self.positions: dict[tuple[str, int], int] = {}
        """Next offset to read per (topic, partition) of queues, results and commands."""
        self.dead_letters_due: dict[str, DeadLetter] = {}
        """Dead letters not yet known to be in Kafka, by key, oldest first, without `original`."""
        self.pending = PendingIndex()
        self.backing_off = DueHeap(self._backs_off)
        self.deadlines = DueHeap(self._waits_to_start)
        self._overdue: dict[str, None] = {}
        self.room_version = 0
        """Grows when room may have appeared: what did not fit before may fit now."""
        self.nodes_version = 0
        """Grows when what nodes offer changes: what matched nowhere may match now."""
        self.ingested = 0
        self.lost_order: dict[str, None] = {}
        """Lost nodes, the one lost first in front."""
        self.members: Members = ()
        """The coordinators by the ledger; empty until it changed them: the cluster file's then."""
        self.members_version = 0
        """How often the ledger changed them (ADR 0012)."""
        self.digest = b""
        """What the fold did so far, chained entry by entry: equal for equal histories, O(1)."""
        self._did: list[tuple[object, ...]] = []
        self._ending: Job | None = None
        self._appliers: dict[type, Callable[[Any, _At], None]] = {
            ledger.TermStarted: self._term_started, ledger.Ingested: self._ingested,
            ledger.Rejected: self._rejected, ledger.NodeSeen: self._node_seen,
            ledger.NodeLost: self._node_lost, ledger.Assigned: self._assigned,
            ledger.Started: self._started, ledger.Released: self._released,
            ledger.ResultRefused: self._result_refused, ledger.Finished: self._finished,
            ledger.RetryScheduled: self._retry_scheduled,
            ledger.DeadLettered: self._dead_lettered,
            ledger.DeadLetterStored: self._dead_letter_stored,
            ledger.Cancelled: self._cancelled, ledger.Commanded: self._commanded,
            ledger.Waiting: self._waiting, ledger.MembersChanged: self._members_changed,
            ledger.LeaseAwaited: self._lease_awaited,
            ledger.LeadConfirmed: self._lead_confirmed, ledger.Vacated: self._vacated,
        }  # fmt: skip

    # --- the fold ---------------------------------------------------------------------------

    def apply(self, offset: int, entry: LedgerEntry) -> Verdict:
        """Judges the entry and, if it is valid, carries its decisions out. Offsets must grow.

        Raises InvariantBrokenError where a valid entry contradicts the state, ValueError where
        the offset was applied before.
        """
        verdict = self.gate.judge(offset, entry)
        if not verdict.valid:
            self.void_counts[verdict.reason] = self.void_counts.get(verdict.reason, 0) + 1
            return verdict
        at = _At(offset, entry.at_ms, entry)
        for decision in entry.decisions:
            self._appliers[type(decision)](decision, at)
        if self._ending is not None:
            raise self._ending.broken("was released without a verdict in the same entry")
        self.at_ms = entry.at_ms
        self._roll(entry)
        return verdict

    def _roll(self, entry: LedgerEntry) -> None:
        """Chains what this entry did to jobs and nodes: a fold that differs shows at once."""
        did = (entry.term, entry.seq, entry.at_ms, self._did, len(self.jobs), len(self.ended))
        told = self.digest + msgspec.msgpack.encode(did)
        self.digest = hashlib.blake2b(told, digest_size=DIGEST_BYTES).digest()
        self._did = []

    def wake(self, now_ms: int) -> int:
        """Lets backing-off jobs whose time has come be found by the scheduler; how many.

        Touches the pending index alone: what the state *says* changes only by `apply`.
        """
        woken = 0
        for due in self.backing_off.take(now_ms):
            job = self.jobs[due.job]
            self.pending.add(job.shape, job.rank, job.id)
            woken += 1
        return woken

    def overdue(self, now_ms: int) -> list[Job]:
        """Waiting jobs of which no attempt has started within their time. Changes nothing said."""
        for due in self.deadlines.take(now_ms):
            self._overdue[due.job] = None
        found: list[Job] = []
        for job_id in list(self._overdue):
            job = self.jobs.get(job_id)
            if job is None or job.phase not in WAITING or not job.start_deadline_ms:
                del self._overdue[job_id]  # if it is placed now, its end watches it again
            else:
                found.append(job)
        return found

    @property
    def term(self) -> int:
        """Highest valid term; 0 before the first."""
        return self.gate.term

    @property
    def next_offset(self) -> int:
        """The ledger offset to read next."""
        return self.gate.next_offset

    def is_known(self, job: str) -> bool:
        """True where a submission with this id is a duplicate."""
        return job in self.jobs or job in self.ended

    def is_current(self, job: str, attempt: int) -> bool:
        """True where this attempt is the one whose result counts."""
        found = self.jobs.get(job)
        return found is not None and found.attempt == attempt and found.phase in PLACED

    # --- decisions, in the order of a job's life ----------------------------------------------

    def _term_started(self, decision: ledger.TermStarted, at: _At) -> None:
        entry = at.entry
        self.terms.append(
            TermRecord(
                term=entry.term, leader=entry.leader, incarnation=entry.incarnation,
                offset=at.offset, at_ms=at.at_ms, why=shorten(decision.why),
            )
        )  # fmt: skip

    def _ingested(self, decision: ledger.Ingested, at: _At) -> None:
        self._advance(decision.source)
        spec = decision.job
        if not spec.id or self.is_known(spec.id):
            raise InvariantBrokenError(f"job {spec.id!r} was ingested twice or without an id")
        self.ingested += 1
        job = Job(spec, decision.queue, decision.source, decision.payload, self.ingested, at.at_ms)
        self.jobs[job.id] = job
        self._did.append((job.seq, job.id))
        counters = self._queue(decision.queue)
        counters.ingested += 1
        counters.pending += 1
        self.pending.add(job.shape, job.rank, job.id)
        self.watch_deadline(job)

    def _rejected(self, decision: ledger.Rejected, at: _At) -> None:
        self._advance(decision.source)
        self._queue(decision.queue).rejected += 1
        if decision.code == DUPLICATE_CODE:
            return
        key = dead_letter_key(decision.source)
        self.dead_letters_due[key] = DeadLetter(
            key=key, queue=decision.queue, job=decision.job, code=decision.code,
            reason=decision.reason, at_ms=at.at_ms, source=decision.source,
        )  # fmt: skip

    def _assigned(self, decision: ledger.Assigned, at: _At) -> None:
        job = self._live(decision.job)
        if decision.attempt != job.attempt + 1:
            raise job.broken(f"attempt {decision.attempt} was assigned out of turn")
        node = self.nodes.get(decision.node)
        if node is None:
            raise job.broken(f"was assigned to node {decision.node}, which nobody has seen")
        asked = job.spec.resources
        if len(decision.gpus) + len(decision.mig) != asked.gpus:
            given = decision.mig or decision.gpus
            raise job.broken(f"asks {asked.gpus} GPUs and was given {given}")
        if job.spec.exclusive is not (decision.lease_ms > 0):
            raise job.broken(f"was assigned with a lease of {decision.lease_ms} ms")
        self._move(job, Cause.ASSIGNED, at, decision.node)
        node.reserve(
            job.id,
            Reservation(decision.attempt, decision.incarnation,
                        max(asked.cpu_millis, 1000 * len(decision.cpus)), asked.memory_bytes,
                        decision.gpus, decision.mig, decision.share, decision.cpus, decision.mems),
        )  # fmt: skip
        job.attempt, job.node = decision.attempt, decision.node
        job.incarnation, job.gpus = decision.incarnation, decision.gpus
        job.lease_ms = decision.lease_ms
        job.started_ms, job.waiting, job.not_before_ms = 0, None, 0
        self.pending.remove(job.id)

    def _started(self, decision: ledger.Started, at: _At) -> None:
        job = self._live(decision.job)
        self._require_current(job, decision.attempt)
        self._move(job, Cause.STARTED, at)
        job.started_ms, job.started_once = at.at_ms, True

    def _released(self, decision: ledger.Released, at: _At) -> None:
        if decision.source is not None:
            self._advance(decision.source)
        job = self._live(decision.job)
        self._require_current(job, decision.attempt)
        if self._ending is not None:
            raise job.broken(f"was released before the verdict on {self._ending.id}")
        if decision.source is None:
            self._require_lease_over(job, at)
        self._move(job, Cause.RELEASED, at, decision.outcome)
        self._ending = job
        node = self.nodes[job.node]
        if decision.source is None:
            node.give_up(job.id)
        else:
            node.release(job.id)
        self.room_version += 1
        if not node.attempts:
            self.orphaning.pop(node.name, None)
        if decision.outcome not in ("node_lost", "platform"):
            job.started_once = True  # it ran, even where its end overtook the news of its start
        story = AttemptStory(
            attempt=decision.attempt, node=job.node, outcome=decision.outcome,
            detail=shorten(decision.detail), exit_code=decision.exit_code, result=decision.source,
        )  # fmt: skip
        job.attempts += (story,)
        job.node, job.incarnation, job.gpus = "", 0, ()
        job.lease_ms, job.lease_awaited = 0, None

    @staticmethod
    def _require_lease_over(job: Job, at: _At) -> None:
        """4: an exclusive attempt whose end nobody saw is released after its lease (ADR 0011)."""
        term, until_ms = job.lease_awaited or (0, 0)
        if job.spec.exclusive and (term != at.entry.term or until_ms > at.at_ms):
            raise job.broken("is exclusive and was released before its lease was over")

    def _lease_awaited(self, decision: ledger.LeaseAwaited, at: _At) -> None:
        job = self._live(decision.job)
        self._require_current(job, decision.attempt)
        if not job.spec.exclusive or job.phase not in PLACED:
            raise job.broken("has no lease to be awaited")
        job.lease_awaited = (at.entry.term, decision.until_ms)
        self._did.append((job.seq, *job.lease_awaited))

    def _lead_confirmed(self, decision: ledger.LeadConfirmed, at: _At) -> None:
        """Its place in the log is all that it says."""

    def _vacated(self, decision: ledger.Vacated, at: _At) -> None:
        node = self.nodes.get(decision.node)
        if node is None or node.incarnation != decision.incarnation:
            return
        for job, attempt in decision.attempts:
            node.vacate(job, attempt)
        self._did.append((node.name, node.free_cpu_millis, node.free_memory_bytes))
        self.room_version += 1

    def _result_refused(self, decision: ledger.ResultRefused, at: _At) -> None:
        self._advance(decision.source)

    def _finished(self, decision: ledger.Finished, at: _At) -> None:
        job = self._live(decision.job)
        last = job.attempts[-1].outcome if job.attempts else "no attempt"
        if job.attempt != decision.attempt or last != "succeeded":
            raise job.broken(f"finished by attempt {decision.attempt}, which did not succeed")
        self._move(job, Cause.FINISHED, at)
        self._end(job, at)

    def _retry_scheduled(self, decision: ledger.RetryScheduled, at: _At) -> None:
        job = self._live(decision.job)
        self._move(job, Cause.RETRY_SCHEDULED, at, shorten(decision.reason))
        job.not_before_ms = decision.not_before_ms
        self.watch_back_off(job)
        self.watch_deadline(job)

    def _dead_lettered(self, decision: ledger.DeadLettered, at: _At) -> None:
        job = self._live(decision.job)
        self._move(job, Cause.DEAD_LETTERED, at, decision.code)
        self._end(job, at, decision.code, decision.reason)
        self.dead_letters_due[job.id] = DeadLetter(
            key=job.id, queue=job.queue, job=job.id, code=decision.code, reason=decision.reason,
            at_ms=at.at_ms, source=job.source, attempts=job.attempts,
        )  # fmt: skip

    def _dead_letter_stored(self, decision: ledger.DeadLetterStored, at: _At) -> None:
        self.dead_letters_due.pop(decision.key, None)

    def _cancelled(self, decision: ledger.Cancelled, at: _At) -> None:
        job = self._live(decision.job)
        self._move(job, Cause.CANCELLED, at, f"by {decision.by}" if decision.by else "")
        self._end(job, at, "Cancelled", f"cancelled by {decision.by}" if decision.by else "")

    def _commanded(self, decision: ledger.Commanded, at: _At) -> None:
        self._advance(decision.source)
        command = decision.command
        if decision.refused or command is None:
            return
        if isinstance(command, CancelJob):
            job = self.jobs.get(command.job)
            if job is not None:
                job.cancel_requested, job.cancel_by = True, decision.by
        elif isinstance(command, DrainNode):
            node = self.nodes.get(command.node)
            if node is not None:
                node.drain_ordered = command.drain
                self._offer_changed()

    def _members_changed(self, decision: ledger.MembersChanged, at: _At) -> None:
        before = {peer.name for peer in self.members}
        after = {peer.name for peer in decision.members}
        one = len(before ^ after) == 1 or not before
        if decision.version != self.members_version + 1 or not after or not one:
            raise InvariantBrokenError(
                f"membership {decision.version} of {sorted(after)} follows "
                f"{self.members_version} of {sorted(before)}: one change at a time"
            )
        self.members, self.members_version = decision.members, decision.version
        self._did.append((decision.version, *sorted(after)))

    def _waiting(self, decision: ledger.Waiting, at: _At) -> None:
        self._live(decision.job).waiting = (decision.code, decision.message)

    def _node_seen(self, decision: ledger.NodeSeen, at: _At) -> None:
        node = self.nodes.get(decision.node)
        if node is None:
            node = self.nodes[decision.node] = Node(decision.node)
        node.see(decision, at.at_ms)
        for name in node.attempts:
            self.jobs[name].lease_awaited = None  # it is back: what was awaited may be renewed
        self._did.append((node.name, node.free_cpu_millis, node.free_memory_bytes))
        self.orphaning.pop(node.name, None)
        self.lost_order.pop(node.name, None)
        self._offer_changed()

    def _node_lost(self, decision: ledger.NodeLost, at: _At) -> None:
        node = self.nodes[decision.node]
        node.lost, node.lost_reason = True, shorten(decision.reason)
        self._did.append((node.name, len(node.attempts)))
        if node.attempts:
            self.orphaning[node.name] = None
        self.lost_order[node.name] = None
        self._offer_changed()
        self._forget_old_lost_nodes()

    # --- helpers of the fold --------------------------------------------------------------------

    def _queue(self, name: str) -> QueueCounters:
        found = self.queues.get(name)
        if found is None:
            found = self.queues[name] = QueueCounters()
        return found

    def _live(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None:
            where = "ended already" if job_id in self.ended else "is unknown"
            raise InvariantBrokenError(f"a decision names job {job_id}, which {where}")
        return job

    @staticmethod
    def _require_current(job: Job, attempt: int) -> None:
        if job.attempt != attempt:
            raise job.broken(f"a decision names attempt {attempt}, which is not current")

    def _advance(self, source: SourceRef) -> None:
        key = (source.topic, source.partition)
        if source.offset < self.positions.get(key, 0):
            raise InvariantBrokenError(
                f"{source} was decided twice; position {self.positions[key]}"
            )
        self.positions[key] = source.offset + 1

    def _move(self, job: Job, cause: Cause, at: _At, note: str = "") -> None:
        counters = self._queue(job.queue)
        counters.count(job.phase, -1)
        job.move(cause, at.at_ms, note)
        counters.count(job.phase, 1)
        self._did.append((job.seq, job.phase, job.attempt, job.node))
        if cause is not Cause.RELEASED and self._ending is job:
            self._ending = None

    def _end(self, job: Job, at: _At, code: str = "", reason: str = "") -> None:
        del self.jobs[job.id]
        self.pending.remove(job.id)
        self.ended[job.id] = ended_job(job, at.at_ms, code, reason)
        while len(self.ended) > ENDED_JOBS_KEPT:
            del self.ended[next(iter(self.ended))]

    def watch_deadline(self, job: Job) -> None:
        """Lets `overdue` find a waiting job that has a deadline to start by."""
        if job.start_deadline_ms:
            self.deadlines.push(Due(job.start_deadline_ms, 0, job.id), len(self.jobs))

    def _waits_to_start(self, due: Due) -> bool:
        job = self.jobs.get(due.job)
        return job is not None and job.phase in WAITING and job.start_deadline_ms > 0

    def watch_back_off(self, job: Job) -> None:
        """Lets `wake` find a job that is backing off."""
        self.backing_off.push(Due(job.not_before_ms, job.attempt, job.id), len(self.jobs))

    def _backs_off(self, due: Due) -> bool:
        job = self.jobs.get(due.job)
        return job is not None and job.phase is Phase.BACKING_OFF and job.attempt == due.attempt

    def _offer_changed(self) -> None:
        self.nodes_version += 1
        self.room_version += 1

    def _forget_old_lost_nodes(self) -> None:
        while len(self.lost_order) > LOST_NODES_KEPT:
            oldest = next((n for n in self.lost_order if not self.nodes[n].attempts), None)
            if oldest is None:
                return
            del self.lost_order[oldest]
            del self.nodes[oldest]

    # --- checks -----------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """What must hold between entries (DESIGN, invariants 3 to 5). For tests and audit: O(n).

        Raises InvariantBrokenError.
        """
        for node in self.nodes.values():
            node.check_invariants()
        held: dict[str, str] = {}
        for node in self.nodes.values():
            for job_id in node.attempts:
                if job_id in held:
                    raise InvariantBrokenError(f"{job_id} is on {held[job_id]} and {node.name}")
                held[job_id] = node.name
        recounted: dict[str, QueueCounters] = {}
        for job in self.jobs.values():
            self._check_job(job, held.pop(job.id, ""))
            recounted.setdefault(job.queue, QueueCounters()).count(job.phase, 1)
        if held:
            raise InvariantBrokenError(f"nodes hold room for jobs that are not live: {held}")
        for name, counters in self.queues.items():
            fresh = recounted.get(name, QueueCounters())
            found = (counters.pending, counters.placed, counters.running)
            if found != (fresh.pending, fresh.placed, fresh.running):
                raise InvariantBrokenError(f"queue {name} is miscounted: {found}, really {fresh}")
            ends = counters.finished + counters.dead + counters.cancelled
            if counters.ingested != ends + counters.live:
                raise InvariantBrokenError(f"queue {name} lost a job or counted one twice")
        if self.jobs.keys() & self.ended.keys():
            raise InvariantBrokenError("a job is live and ended at once")

    def _check_job(self, job: Job, held_by: str) -> None:
        if job.phase is Phase.ENDING or job.phase in ENDED:
            raise job.broken(f"is live and {job.phase}")
        if (job.phase in PLACED) != bool(job.node) or job.node != held_by:
            raise job.broken(f"is {job.phase} on {job.node!r} and held by {held_by!r}")
        if job.phase is Phase.PENDING and job.id not in self.pending:
            raise job.broken("is pending and the scheduler cannot find it")
        if job.phase in PLACED and job.id in self.pending:
            raise job.broken("is placed and the scheduler would place it again")
        if len(job.attempts) != job.attempt - (job.phase in PLACED):
            raise job.broken(f"has {len(job.attempts)} attempt stories")

    def state_hash(self) -> str:
        """blake2b over everything a state says, in canonical order; equal for equal histories.

        Indices, void entries and offsets of the ledger itself are left out.
        """
        gate = self.gate
        content = (
            (gate.term, gate.leader, gate.incarnation, gate.seq),
            tuple(self.terms), self.ingested,
            sorted((j.id, _job_content(j)) for j in self.jobs.values()),
            tuple(self.ended.values()),
            sorted((n.name, _node_content(n)) for n in self.nodes.values()),
            sorted(self.orphaning), sorted(self.queues.items()), sorted(self.positions.items()),
            tuple(self.dead_letters_due.values()), self.members_version, self.members,
        )  # fmt: skip
        return hashlib.blake2b(
            msgspec.msgpack.encode(content), digest_size=DIGEST_BYTES
        ).hexdigest()


def _job_content(job: Job) -> tuple[object, ...]:
    return (
        job.queue, job.source, job.spec, job.payload, job.seq, job.ingested_ms, job.phase,
        job.attempt, job.node, job.incarnation, job.gpus, job.lease_ms, job.lease_awaited,
        job.started_ms, job.started_once,
        job.not_before_ms, job.waiting, job.cancel_requested, job.cancel_by, job.attempts,
        job.story,
    )  # fmt: skip


def _node_content(node: Node) -> tuple[object, ...]:
    return (
        node.incarnation, node.capacity, sorted(node.enforces), sorted(node.labels.items()),
        node.drain_reported, node.drain_ordered, node.lost, node.lost_reason, node.seen_ms,
        sorted(node.attempts.items()), sorted(node.given_up.items()),
        node.topology, node.simulated, node.drain_reason, *sorted(node.images.items()),
    )  # fmt: skip
