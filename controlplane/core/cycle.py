"""One decision cycle of a leader: inputs and a frozen state in, one batch of decisions out.

The steps run in an order with a reason: what frees room comes before what uses it, and what brings
new work comes last, so that a full batch delays intake and never the end of a job.
Nothing here changes the state; inputs that were taken are dropped with the role if the batch fails.
"""

from collections import deque
from collections.abc import Mapping
from typing import Final

import msgspec

from controlplane.core.admission import admit
from controlplane.core.batch import Batch
from controlplane.core.bounds import (
    DEAD_LETTERS_DUE_MAX,
    RESULT_DECISIONS_MAX,
    WAITING_CHECKS_MAX,
)
from controlplane.core.events import CommandRead, ResultRead
from controlplane.core.inbox import Inbox
from controlplane.core.leases import LeaseBook
from controlplane.core.membership import Voters, changed
from controlplane.core.results import START_DEADLINE_PASSED, end_attempt, refuse, why_refused
from controlplane.core.scheduler import Scheduler
from controlplane.core.waiting import Looks, WaitingBook
from controlplane.core.watch import Watch
from dataplane.core.devices import Grant
from dataplane.core.explain import why_unplaceable
from dataplane.core.jobs import WAITING, Job, Phase, shorten
from dataplane.core.nodes import Shape
from dataplane.core.pending import ShapeQueue
from dataplane.core.state import PoolState
from idl.ids import is_valid_name
from idl.ledger import (
    Assigned,
    Cancelled,
    Commanded,
    DeadLettered,
    DeadLetterStored,
    Ingested,
    LeadConfirmed,
    LeaseAwaited,
    PendingCode,
    Started,
    Vacated,
    Waiting,
)
from idl.members import Members
from idl.records import AddMember, CancelJob, Outcome, RemoveMember, TransferLeader
from idl.settings import QueuePolicy

_CHARS: Final = 4
"""Bytes that a character of free text may take in UTF-8."""


def _grant_bytes(grant: Grant) -> int:
    """Estimate: numbers with their commas, UUIDs of MIG instances."""
    return 9 * (len(grant.gpus) + len(grant.cpus)) + 48 * len(grant.mig)


class Inputs(msgspec.Struct):
    """Everything that a cycle decides upon. Deques and sets are consumed."""

    state: PoolState
    inbox: Inbox
    watch: Watch
    leases: LeaseBook
    exclusive_lease_ms: int
    scheduler: Scheduler
    policies: Mapping[str, QueuePolicy]
    dead_letters_written: dict[str, None]
    told: WaitingBook
    members: Members = ()
    """Of the cluster file."""
    voters: Voters = Voters()


class Cycle:
    """One use, one batch: `run` returns it."""

    def __init__(self, inputs: Inputs, now_ms: int, *, look_for_lost: bool, say_why: bool) -> None:
        self.given = inputs
        self.state = inputs.state
        self.now_ms = now_ms
        self.batch = Batch(inputs.state)
        self._look_for_lost = look_for_lost
        self._say_why = say_why
        self._members_changed = False

    def run(self) -> Batch:
        """The numbered steps. The batch may be empty."""
        self._1_results()
        self._2_nodes()
        self._3_attempts_without_result()
        self._4_starts()
        self._5_commands()
        self._6_dead_letters_stored()
        self._7_start_deadlines()
        self._8_placements()
        self._9_waiting()
        self._10_admissions()
        self._11_leases()
        return self.batch

    # --- 1 to 4: attempts end, nodes change, attempts start -----------------------------------

    def _1_results(self) -> None:
        results, batch = self.given.inbox.results, self.batch
        while results and len(batch.decisions) < RESULT_DECISIONS_MAX and batch.has_room(2):
            if not self._decide_result(results[0]):
                return  # its job is touched already: this result and later ones wait
            results.popleft()

    def _decide_result(self, read: ResultRead) -> bool:
        result = read.result
        if result is None:
            why = f"{read.error_code}: {read.error_message}"
            self.batch.add(refuse(read.source, read.key, 0, why))
            return True
        if result.job in self.batch.touched:
            return False
        why = why_refused(self.state, result)
        if why:
            self.batch.add(refuse(read.source, result.job, result.attempt, why))
            return True
        job = self.state.jobs[result.job]
        ended = end_attempt(
            job, result.outcome, self.now_ms, result.detail, result.exit_code, read.source
        )
        self.batch.free(job.id)
        self.batch.add(*ended, job=job.id, size_bytes=2 * _CHARS * len(ended[0].detail))
        return True

    def _2_nodes(self) -> None:
        watch, batch = self.given.watch, self.batch
        for name in list(watch.changed):
            if not batch.has_room():
                return
            seen = watch.seen(self.state, name)
            if seen is not None:
                batch.add(seen, size_bytes=len(msgspec.msgpack.encode(seen)))
                batch.nodes_changed.add(name)
            del watch.changed[name]
        self._vacated()
        if not self._look_for_lost:
            return
        for lost in watch.silent(self.state, self.now_ms):
            if not batch.has_room():
                return
            if lost.node not in batch.nodes_changed:
                batch.add(lost)
                batch.nodes_changed.add(lost.node)

    def _vacated(self) -> None:
        """Room that returns because nodes really have it again."""
        vacated = self.given.watch.vacated
        for name, listed in list(vacated.items()):
            node = self.state.nodes[name]
            keys = tuple(key for key in listed if key in node.given_up)
            if not self.batch.has_room(1, 64 * len(keys)):
                return
            if keys and not node.lost:
                said = Vacated(node=name, incarnation=node.incarnation, attempts=keys)
                self.batch.add(said, size_bytes=64 * len(keys))
            del vacated[name]

    def _3_attempts_without_result(self) -> None:
        for name in self.state.orphaning:
            node = self.state.nodes[name]
            if name in self.batch.nodes_changed:
                continue  # it is back: its attempts are not given up any more
            for job_id in node.attempts:
                if not self._release(self.state.jobs[job_id], "node_lost", node.lost_reason):
                    return
        gone = self.given.watch.gone
        for job_id, found in list(gone.items()):
            if (
                job_id in self.state.jobs
                and self.state.jobs[job_id].node in self.batch.nodes_changed
            ):
                continue  # the entry says something of its node first: see the next one
            if self.state.is_current(job_id, found.attempt):
                job = self.state.jobs[job_id]
                if not self._release(job, found.outcome, found.detail):
                    return
            del gone[job_id]
        for job_id, attempt, outcome, detail in self.given.leases.given_up():
            job = self.state.jobs[job_id]
            if job.node in self.batch.nodes_changed or job.attempt != attempt:
                continue
            if not self._release(job, outcome, detail):
                return

    def _release(self, job: Job, outcome: Outcome, detail: str) -> bool:
        """Ends an attempt without a result, an exclusive one not before its lease is over. False
        where the batch is full."""
        if job.id in self.batch.touched:
            return True
        if not self.batch.has_room(3, _CHARS * len(detail)):
            return False
        if job.lease_ms and not self._lease_over(job, outcome, detail):
            return True
        node = self.state.nodes[job.node]
        if job.incarnation != node.incarnation:
            self.batch.free(job.id)  # else the node may hold it still: see Vacated
        ended = end_attempt(job, outcome, self.now_ms, detail)
        self.batch.add(*ended, job=job.id, size_bytes=_CHARS * len(detail))
        return True

    def _lease_over(self, job: Job, outcome: Outcome, detail: str) -> bool:
        """True where no node can run the attempt any more. Says until when it may, once."""
        leases = self.given.leases
        until_ms = leases.give_up(job.id, outcome, detail)
        over = until_ms <= self.now_ms
        if job.lease_awaited != (self.state.term, until_ms):
            awaited = LeaseAwaited(job=job.id, attempt=job.attempt, until_ms=until_ms)
            self.batch.add(awaited, job="" if over else job.id)
        if over:
            leases.release(job.id)
        return over

    def _4_starts(self) -> None:
        started = self.given.watch.started
        for job_id, attempt in list(started.items()):
            if not self.batch.has_room():
                return
            job = self.state.jobs.get(job_id)
            if job_id in self.batch.touched:
                continue  # after this entry it has ended, or it starts with the next
            if job and job.phase is Phase.ASSIGNED and job.attempt == attempt:
                self.batch.add(Started(job=job_id, attempt=attempt), job=job_id)
            del started[job_id]

    # --- 5 to 7: operators, dead letters, deadlines -------------------------------------------

    def _5_commands(self) -> None:
        commands = self.given.inbox.commands
        while commands and self.batch.has_room(2):
            if not self._decide_command(commands[0]):
                return
            commands.popleft()

    def _decide_command(self, read: CommandRead) -> bool:
        """False where the command has to wait for the next entry."""
        record = read.record
        if record is None:
            refused = shorten(f"{read.error_code}: {read.error_message}")
            self.batch.add(Commanded(source=read.source, command=None, refused=refused))
            return True
        by, command = shorten(record.by), record.command
        if isinstance(command, TransferLeader):
            refused = self._why_not_transfer(command.to)
            order = None if refused else command
            self.batch.add(Commanded(source=read.source, command=order, by=by, refused=refused))
            return True
        if isinstance(command, AddMember | RemoveMember):
            return self._change_members(read, command, by)
        target = command.job if isinstance(command, CancelJob) else command.node
        if not is_valid_name(target):
            refused = f"{shorten(target)!r} is not a name"
            self.batch.add(Commanded(source=read.source, command=None, by=by, refused=refused))
            return True
        if isinstance(command, CancelJob):
            return self._cancel(read, command, by)
        known = command.node in self.state.nodes
        self.batch.add(
            Commanded(
                source=read.source, command=command, by=by,
                refused="" if known else f"no node {command.node} was ever seen",
            )
        )  # fmt: skip
        self.batch.nodes_changed.add(command.node)
        return True

    def _why_not_transfer(self, to: str) -> str:
        leads = self.state.gate.leader  # that is us
        names = [peer.name for peer in self.state.members or self.given.members]
        if to and names and to not in names:
            return f"{shorten(to)!r} is no coordinator (there: {', '.join(names)})"
        return f"{leads} leads already" if to == leads else ""

    def _change_members(self, read: CommandRead, order: AddMember | RemoveMember, by: str) -> bool:
        """One change an entry; a new leader first hears who answers, which takes a heartbeat."""
        voters = self.given.voters
        if self._members_changed or not voters.heard:
            return False
        decision, refused = changed(self.state, self.given.members, voters, order)
        command = order if decision is not None else None  # what is refused may be of any size
        size = len(msgspec.msgpack.encode(decision)) * 2
        self.batch.add(
            Commanded(source=read.source, command=command, by=by, refused=refused), size_bytes=size
        )
        if decision is not None:
            self.batch.add(decision)
            self._members_changed = True
        return True

    def _cancel(self, read: CommandRead, command: CancelJob, by: str) -> bool:
        if command.job in self.batch.touched:
            return False
        job = self.state.jobs.get(command.job)
        refused = ""
        if job is None:
            ended = self.state.ended.get(command.job)
            refused = f"job {command.job} is {ended.phase} already" if ended else "no such job"
        said = Commanded(source=read.source, command=command, by=by, refused=refused)
        if job is not None and job.phase in WAITING:
            self.batch.add(said, Cancelled(job=job.id, by=by), job=job.id)
        else:
            self.batch.add(said, job=command.job)
        return True

    def _6_dead_letters_stored(self) -> None:
        written = self.given.dead_letters_written
        for key in list(written):
            if not self.batch.has_room():
                return
            if key in self.state.dead_letters_due:
                self.batch.add(DeadLetterStored(key=key), size_bytes=len(key))
            del written[key]

    def _7_start_deadlines(self) -> None:
        looks, found = Looks(self.state), dict[Shape, tuple[PendingCode, str] | None]()
        for job in self.state.overdue(self.now_ms):
            if not self.batch.has_room(1, 2048) or looks.checks > WAITING_CHECKS_MAX:
                return  # the others are in the entry after this one
            if job.id in self.batch.touched:
                continue
            if job.shape not in found:
                found[job.shape] = why_unplaceable(looks.of(job.shape), job.shape)
            why = found[job.shape]
            if job.phase is Phase.BACKING_OFF and job.attempts:
                reason = f"BackingOff: its last attempt ended as {job.attempts[-1].outcome}"
            elif why is not None:
                reason = f"{why[0]}: {why[1]}"
            else:
                reason = "WaitingForResources: the nodes that could run it were in use"
            text = shorten(f"not started within {job.spec.start_within_ms} ms; {reason}")
            self.batch.add(
                DeadLettered(job=job.id, code=START_DEADLINE_PASSED, reason=text),
                job=job.id, size_bytes=_CHARS * len(text),
            )  # fmt: skip

    # --- 8 to 10: work is placed, the rest is told why, new work comes in ---------------------

    def _8_placements(self) -> None:
        self.state.wake(self.now_ms)
        batch = self.batch
        plan = self.given.scheduler.plan(
            self.state, batch.left, batch.touched, batch.freed, batch.nodes_changed
        )
        for placement in plan:
            job = self.state.jobs[placement.job]
            assigned = Assigned(
                job=job.id, attempt=job.attempt + 1, node=placement.node,
                incarnation=placement.incarnation, **placement.grant._asdict(),
                lease_ms=self.given.exclusive_lease_ms if job.spec.exclusive else 0,
            )  # fmt: skip
            batch.add(assigned, job=job.id, size_bytes=_grant_bytes(placement.grant))

    def _9_waiting(self) -> None:
        if not self._say_why or self.batch.nodes_changed:
            return
        for queue, known in self.given.told.look(self.state):
            if known.why is not None and not self._tell(known.due(queue), queue, known.why):
                return

    def _tell(self, due: deque[str], queue: ShapeQueue, why: tuple[PendingCode, str]) -> bool:
        """Records `why` for the jobs that are due and do not know it. False: batch full."""
        code, message = why
        while due:
            if not self.batch.has_room(1, _CHARS * len(message)):
                return False
            job = due.popleft()
            if job not in queue.members or job in self.batch.touched:
                continue  # it left, or does with this entry
            if self.state.jobs[job].waiting != why:
                said = Waiting(job=job, code=code, message=message)
                self.batch.add(said, job=job, size_bytes=_CHARS * len(message))
        return True

    def _10_admissions(self) -> None:
        """Queues take turns, one submission each, until the batch is full or they hold enough."""
        admitted: dict[str, int] = {}
        turns = [queue for queue, waiting in self.given.inbox.submissions.items() if waiting]
        due = len(self.state.dead_letters_due)
        while turns and due < DEAD_LETTERS_DUE_MAX:
            still: list[str] = []
            for queue in turns:
                more, refused = self._admit_next(queue, admitted)
                due += refused
                if more:
                    still.append(queue)
            turns = still

    def _admit_next(self, queue: str, admitted: dict[str, int]) -> tuple[bool, bool]:
        """(the queue may have another turn, the submission was refused)."""
        inbox, batch = self.given.inbox, self.batch
        waiting, ours = inbox.submissions[queue], admitted.get(queue, 0)
        pool_room = inbox.pool_room(self.state) - sum(admitted.values())
        if min(inbox.live_room(self.state, queue) - ours, pool_room) <= 0:
            return False, False
        counters = self.state.queues.get(queue)
        pending = (counters.pending if counters else 0) + ours
        decision = admit(waiting[0], self.state, batch.ingested, self.given.policies, pending)
        size = len(msgspec.msgpack.encode(decision))
        if not batch.has_room(1, size):
            return False, False
        batch.add(decision, size_bytes=size)
        waiting.popleft()
        if isinstance(decision, Ingested):
            batch.ingested.add(decision.job.id)
            admitted[queue] = ours + 1
        return bool(waiting), not isinstance(decision, Ingested)

    def _11_leases(self) -> None:
        """Any entry of ours proves that we led when it was appended; without another, this one."""
        leases = self.given.leases
        if leases.unconfirmed and not self.batch.decisions:
            self.batch.add(LeadConfirmed(leases=leases.out))
