"""The coordinator core: folds the ledger, and while it leads, decides. See `step`.

The protocol that makes this safe (ADR 0001):

* standby and leader apply the same ledger entries by the same fold; nothing else changes the state;
* a won election only allows to append `TermStarted`; the role begins when that is read back valid;
* at most one entry is in flight. It is built against the applied state, so if it turns out valid
  it applies to exactly the state that it was built against;
* what a decision causes (intents, dead letters) is ordered only after it was read back as valid;
* an append that failed may have succeeded: the same entry is appended again, and the ledger's rule
  voids the second. A void entry of ours, or a higher term, ends the role; the state is still right.
"""

from collections.abc import Mapping
from enum import StrEnum

from controlplane.core.bounds import (
    APPEND_RETRY_MS,
    APPEND_RETRY_MS_MAX,
    APPEND_STALL_MS,
    DEAD_LETTER_RESEND_MS,
    IDLE_TICK_MS,
    LOST_CHECK_MS,
    QUEUE_STATE_MS,
    SELF_PAUSE_MS,
    WAITING_GRACE_MS,
)
from controlplane.core.cycle import Cycle, Inputs
from controlplane.core.divergence import DigestWatch
from controlplane.core.events import (
    AdoptMembers,
    Append,
    AppendFailed,
    BacklogMeasured,
    CloseIntake,
    CommandsRead,
    CoordinatorEffect,
    CoordinatorEvent,
    DeadLetterWritten,
    Leading,
    LedgerRead,
    LedgerStalled,
    NodeReported,
    OpenIntake,
    Position,
    PublishQueueState,
    Resign,
    ResultsRead,
    RoleLost,
    RoleWon,
    SendIntent,
    ShowDivergence,
    ShowKafka,
    StateClaimed,
    StatusReported,
    SubmissionsRead,
    Tick,
    VotersHeard,
    WriteDeadLetter,
)
from controlplane.core.inbox import Inbox
from controlplane.core.intents import IntentBook
from controlplane.core.membership import Voters
from controlplane.core.pace import EntryPace
from controlplane.core.scheduler import Scheduler
from controlplane.core.waiting import WaitingBook
from controlplane.core.watch import Watch
from dataplane.core.state import PoolState, QueueCounters, dead_letter_key
from dataplane.core.validity import Verdict
from idl.control import AttemptStatus, Intent, QueueState
from idl.errors import InvariantBrokenError
from idl.ids import CoordinatorId, Incarnation, PoolName
from idl.ledger import (
    Assigned,
    Commanded,
    DeadLettered,
    Decision,
    LedgerEntry,
    NodeSeen,
    Rejected,
    Released,
    TermStarted,
)
from idl.members import Members
from idl.records import CancelJob, TransferLeader
from idl.settings import NodeTiming, QueuePolicy


class Role(StrEnum):
    """STARTING: elected, `TermStarted` not read back yet. Only LEADING decides."""

    STANDBY = "standby"
    STARTING = "starting"
    LEADING = "leading"


class _Flight:
    """The one entry on its way to the ledger."""

    __slots__ = ("entry", "retry_at_ms", "retry_ms", "since_ms")

    def __init__(self, entry: LedgerEntry, now_ms: int) -> None:
        self.entry = entry
        self.since_ms = now_ms
        self.retry_ms = APPEND_RETRY_MS
        self.retry_at_ms: int | None = None
        """When to append again; None while an append is under way."""


class Coordinator:
    """One process's coordinator core. `state` may be read by anybody between steps."""

    def __init__(
        self,
        name: CoordinatorId,
        incarnation: Incarnation,
        pool: PoolName,
        policies: Mapping[str, QueuePolicy],
        timing: NodeTiming,
        members: Members = (),
    ) -> None:
        """`members`: of the cluster file, in force until the ledger changes them."""
        self.name = name
        self.incarnation = incarnation
        self.pool = pool
        self.state = PoolState()
        self.role = Role.STANDBY
        self.term = 0
        """The term that this process started or tries to start; 0 as a standby."""
        self.kafka_stalled = False
        self.kafka_stalled_since_ms = 0
        """Epoch ms at which the stall was noticed; 0 while there is none."""
        self.diverged = ""
        """Why this state cannot be trusted; "" while nothing speaks against it."""
        self._digests = DigestWatch()
        self._policies = dict(policies)
        self._inbox = Inbox(self._policies)
        self._watch = Watch(pool, timing)
        self._book = IntentBook(timing.resend_ms)
        self._inputs = Inputs(
            state=self.state, inbox=self._inbox, watch=self._watch, scheduler=Scheduler(),
            policies=self._policies, dead_letters_written={}, told=WaitingBook(), members=members,
            leases=self._book.leases, exclusive_lease_ms=timing.exclusive_lease_ms,
        )  # fmt: skip
        self._seq = 0
        self._flight: _Flight | None = None
        self._pace = EntryPace()
        self._out: list[CoordinatorEffect] = []
        self._backlog: dict[str, int] = {}
        self._published: dict[str, QueueState] = {}
        self._last_step_ms = 0
        self._lead_since_ms = 0
        self._lost_check_ms = 0
        self._publish_ms = 0
        self._dead_letters_ms = 0

    # --- the interface ------------------------------------------------------------------------

    def adopt(self, state: PoolState) -> None:
        """Goes on from a recovered state (snapshot), before the first step. Then the ledger from
        `state.next_offset` on is what it reads."""
        if self._last_step_ms:
            raise InvariantBrokenError("a state was adopted after the first step")
        self.state = self._inputs.state = state

    def step(self, event: CoordinatorEvent, now_ms: int) -> tuple[CoordinatorEffect, ...]:
        """Takes one event; returns what to do, in order. `now_ms`: epoch ms, never going back.

        Raises InvariantBrokenError where the ledger or this code contradicts itself: the process
        must end rather than guess.
        """
        self._notice_own_sleep(now_ms)
        self._take(event, now_ms)
        if self.role is not Role.STANDBY:
            self._mind_the_flight(now_ms)
        if self.role is Role.LEADING:
            self._decide(now_ms)
            self._mind_dead_letters(now_ms)
            self._out.extend(self._inbox.flow(self.state))
            self._send_intents(now_ms)
            self._publish(now_ms)
        out, self._out = tuple(self._out), []
        return out

    def next_wakeup_ms(self, now_ms: int) -> int | None:
        """Epoch ms at which a `Tick` is due; None: only events matter (standby)."""
        if self.role is Role.STANDBY:
            return None
        times = [now_ms + IDLE_TICK_MS]
        if self._flight is not None:
            times.append(self._flight.retry_at_ms or self._flight.since_ms + APPEND_STALL_MS)
        if self.role is Role.LEADING:
            times.extend((self._publish_ms, self._book.next_due_ms or 0))
            if self._flight is None:
                times.extend(self._decision_times(now_ms))
        return min(time for time in times if time > now_ms)

    def _decision_times(self, now_ms: int) -> tuple[int, ...]:
        """When a cycle may have something to decide without any event; those past are not due."""
        state = self.state
        return (
            self._pace.held_until_ms,
            self._lost_check_ms,
            self._lead_since_ms + WAITING_GRACE_MS,
            state.backing_off.first_ms,
            state.deadlines.first_ms,
            self._go_on_ms(now_ms),
            self._book.leases.next_look_ms(now_ms),
        )

    def _go_on_ms(self, now_ms: int) -> int:
        """When to take up what the last cycle had no time for; 0 where there is nothing."""
        left = self._inputs.scheduler.cut_short or self._inputs.told.cut_short
        return max(now_ms + 1, self._pace.held_until_ms) if left else 0

    # --- events -------------------------------------------------------------------------------

    def _take(self, event: CoordinatorEvent, now_ms: int) -> None:
        match event:
            case LedgerRead():
                self._read_back(event, now_ms)
            case AppendFailed():
                self._append_failed(event, now_ms)
            case RoleWon():
                self._role_won(event, now_ms)
            case RoleLost():
                self._become_standby()
            case SubmissionsRead() | ResultsRead() | CommandsRead():
                self._take_records(event)
            case NodeReported() | StatusReported():
                self._take_message(event, now_ms)
            case LedgerStalled() | StateClaimed():
                self._take_warning(event, now_ms)
            case VotersHeard():
                self._inputs.voters = event.voters
            case DeadLetterWritten():
                if event.key in self.state.dead_letters_due:
                    self._inputs.dead_letters_written[event.key] = None
            case BacklogMeasured():
                self._backlog[event.queue] = event.unread
            case Tick():
                pass

    def _take_records(self, event: SubmissionsRead | ResultsRead | CommandsRead) -> None:
        if self.role is not Role.LEADING or event.term != self.term:
            return  # read under an earlier intake: its successor reads it again
        if isinstance(event, SubmissionsRead):
            self._inbox.add_submissions(event.submissions)
        elif isinstance(event, ResultsRead):
            self._inbox.add_results(event.results)
        else:
            self._inbox.add_commands(event.commands)

    def _take_message(self, event: NodeReported | StatusReported, now_ms: int) -> None:
        if isinstance(event, NodeReported):
            self._watch.report(event.report, now_ms)
        elif self.role is Role.LEADING:
            self._watch.status(event.status, self.state, self._book, now_ms)
        else:
            self._watch.hear(event.status, now_ms)
        if isinstance(event, StatusReported):
            self._tell_members(event.status)

    def _tell_members(self, status: AttemptStatus) -> None:
        """A node that knows older coordinators is told at every heartbeat until it follows.

        By standbys too: the leader may be one that the node does not call yet.
        """
        state = self.state
        known = status.members_version >= state.members_version
        if known or not status.full or status.pool != self.pool:
            return
        intent = Intent(
            pool=self.pool, node=status.node, node_incarnation=status.incarnation, term=state.term,
            leader=self.name, items=(), members_version=state.members_version,
            members=state.members,
        )  # fmt: skip
        self._out.append(SendIntent(intent=intent))

    def _notice_own_sleep(self, now_ms: int) -> None:
        if now_ms - self._last_step_ms > SELF_PAUSE_MS:
            self._watch.listen_anew(now_ms)
        self._last_step_ms = now_ms

    # --- the role -----------------------------------------------------------------------------

    def _role_won(self, won: RoleWon, now_ms: int) -> None:
        self._become_standby()
        if won.term <= self.state.term:
            reason = f"the ledger is at term {self.state.term}, term {won.term} is too late"
            self._out.append(Resign(reason=reason))
            return
        self.role, self.term, self._seq = Role.STARTING, won.term, 0
        started = TermStarted(pool=self.pool, previous_term=self.state.term, why=won.why)
        self._append((started,), now_ms)

    def _become_leader(self, now_ms: int) -> None:
        """`TermStarted` counts. Everything that a leader holds in memory comes from the state."""
        state = self.state
        self.role = Role.LEADING
        self._lead_since_ms = self._lost_check_ms = self._publish_ms = now_ms
        self._dead_letters_ms = now_ms + DEAD_LETTER_RESEND_MS
        self._pace.lead()
        self._watch.lead(now_ms)
        self._book.leases.lead(state, now_ms)
        self._inbox.open(state.positions)
        for node in state.nodes.values():
            for job in node.attempts:
                self._book.tell(job)
        self._out.append(Leading(term=self.term))
        positions = tuple(
            Position(topic=topic, partition=partition, next_offset=offset)
            for (topic, partition), offset in sorted(state.positions.items())
        )
        self._out.append(OpenIntake(term=self.term, positions=positions))
        self._out.extend(WriteDeadLetter(letter=due) for due in state.dead_letters_due.values())

    def _become_standby(self) -> None:
        """Drops all that was not decided: Kafka still has it. The state stays, it is right."""
        if self.role is Role.LEADING:
            self._out.append(CloseIntake())
        self.role, self.term, self._flight = Role.STANDBY, 0, None
        self._inbox.close()
        self._book.clear()
        self._watch.drop()
        self._inputs.dead_letters_written.clear()
        self._inputs.told.clear()
        self._inputs.voters = Voters()
        self._published.clear()
        self._show_kafka(stalled=False)

    def _resign(self, reason: str, to: str = "") -> None:
        self._become_standby()
        self._out.append(Resign(reason=reason, to=to))

    # --- the ledger ---------------------------------------------------------------------------

    def _append(self, decisions: tuple[Decision, ...], now_ms: int) -> None:
        self._seq += 1
        self._book.leases.appended(self._seq)
        entry = LedgerEntry(
            term=self.term, leader=self.name, incarnation=self.incarnation, seq=self._seq,
            at_ms=now_ms, decisions=decisions,
        )  # fmt: skip
        self._flight = _Flight(entry, now_ms)
        self._pace.appended(len(decisions), now_ms)
        self._out.append(Append(entry=entry))

    def _append_failed(self, failed: AppendFailed, now_ms: int) -> None:
        flight = self._flight
        if flight is None or (failed.term, failed.seq) != (flight.entry.term, flight.entry.seq):
            return  # read back meanwhile, or of a role long gone
        if not failed.retryable:
            self._resign(f"the ledger refuses our records: {failed.reason}")
            return
        flight.retry_at_ms = now_ms + flight.retry_ms
        flight.retry_ms = min(flight.retry_ms * 2, APPEND_RETRY_MS_MAX)
        self._show_kafka(stalled=True, reason=failed.reason)

    def _mind_the_flight(self, now_ms: int) -> None:
        flight = self._flight
        if flight is None:
            return
        if flight.retry_at_ms is not None and flight.retry_at_ms <= now_ms:
            flight.retry_at_ms = None
            self._out.append(Append(entry=flight.entry))
        if now_ms - flight.since_ms >= APPEND_STALL_MS:
            self._show_kafka(stalled=True, reason="an append was not read back in time")

    def _take_warning(self, event: LedgerStalled | StateClaimed, now_ms: int) -> None:
        if isinstance(event, StateClaimed):
            if event.beacon.leader != self.name:
                self._compare(self._digests.heard(event.beacon, self.state.next_offset))
            return
        overdue = self._flight is not None and now_ms - self._flight.since_ms >= APPEND_STALL_MS
        if self.role is not Role.STANDBY and (event.stalled or not overdue):
            self._show_kafka(stalled=event.stalled, reason=event.reason)

    def _show_kafka(self, *, stalled: bool, reason: str = "") -> None:
        if stalled is not self.kafka_stalled:
            self.kafka_stalled = stalled
            self.kafka_stalled_since_ms = self._last_step_ms if stalled else 0
            self._out.append(ShowKafka(stalled=stalled, reason=reason))

    def _read_back(self, read: LedgerRead, now_ms: int) -> None:
        entry, state = read.entry, self.state
        version = state.members_version
        verdict = state.apply(read.offset, entry)
        if state.members_version > version:
            adopted = AdoptMembers(version=state.members_version, members=state.members)
            self._out.append(adopted)
            self._inputs.voters = Voters()  # who knows this one is still to be heard
        self._compare(self._digests.applied(self.state.next_offset, self.state.digest))
        if self.role is Role.STANDBY:
            return
        me = (self.name, self.incarnation)
        if entry.term == self.term and (entry.leader, entry.incarnation) == me:
            self._read_own(entry, verdict, now_ms)
        elif self.state.term > self.term or (
            self.state.term == self.term
            and (self.state.gate.leader, self.state.gate.incarnation) != me
        ):
            self._resign(f"{self.state.gate.leader} started term {self.state.term} in the ledger")

    def _read_own(self, entry: LedgerEntry, verdict: Verdict, now_ms: int) -> None:
        if not verdict.valid:
            if verdict.reason != "duplicate":
                self._resign(f"our entry {entry.seq} is void: {verdict.detail}")
            return
        self._flight = None
        self._book.leases.confirmed(entry.seq)
        self._show_kafka(stalled=False)
        if self.role is Role.STARTING:
            self._become_leader(now_ms)
        else:
            self._follow_up(entry)

    def _follow_up(self, entry: LedgerEntry) -> None:
        """What valid decisions of ours cause outside of the ledger."""
        state, book = self.state, self._book
        transfer: Commanded | None = None
        for decision in entry.decisions:
            match decision:
                case Assigned():
                    book.leases.follow(state.jobs[decision.job])
                    book.tell(decision.job)
                case NodeSeen():
                    book.leases.back(state.nodes[decision.node].attempts)
                case Released():
                    book.settle(decision.job)
                    if decision.source is not None:
                        book.forget(self._last_node(decision.job), decision.job, decision.attempt)
                case Commanded(command=CancelJob(job=job)) if state.jobs.get(job):
                    book.tell(job)
                case Commanded(command=TransferLeader(), refused=""):
                    transfer = decision
                case DeadLettered():
                    self._write_dead_letter(decision.job)
                case Rejected():
                    self._write_dead_letter(dead_letter_key(decision.source))
                case _:
                    pass
        if transfer is not None and isinstance(transfer.command, TransferLeader):
            by = f" by {transfer.by}" if transfer.by else ""
            self._resign(f"transfer ordered{by}", transfer.command.to)

    def _write_dead_letter(self, key: str) -> None:
        letter = self.state.dead_letters_due.get(key)
        if letter is not None:  # a refused duplicate has none
            self._out.append(WriteDeadLetter(letter=letter))

    def _last_node(self, job: str) -> str:
        """Where the attempt of `job` that was just released had run."""
        live = self.state.jobs.get(job)
        return live.attempts[-1].node if live is not None else self.state.ended[job].node

    def _compare(self, difference: str) -> None:
        """Said once: from then on this process does not stand for election."""
        if difference and not self.diverged:
            self.diverged = difference
            self._out.append(ShowDivergence(reason=difference))

    # --- decisions and their timers -----------------------------------------------------------

    def _decide(self, now_ms: int) -> None:
        placed = sum(counters.placed for counters in self.state.queues.values())
        if self._flight is not None or self._pace.holds(placed, now_ms):
            return
        look_for_lost = now_ms >= self._lost_check_ms
        if look_for_lost:
            self._lost_check_ms = now_ms + LOST_CHECK_MS
        say_why = now_ms - self._lead_since_ms >= WAITING_GRACE_MS
        batch = Cycle(self._inputs, now_ms, look_for_lost=look_for_lost, say_why=say_why).run()
        if batch.decisions:
            self._append(tuple(batch.decisions), now_ms)

    def _mind_dead_letters(self, now_ms: int) -> None:
        """Orders those again that are long unconfirmed: nothing may hang for ever."""
        if now_ms < self._dead_letters_ms:
            return
        self._dead_letters_ms = now_ms + DEAD_LETTER_RESEND_MS
        for key, letter in self.state.dead_letters_due.items():
            confirmed = key in self._inputs.dead_letters_written
            if not confirmed and now_ms - letter.at_ms >= DEAD_LETTER_RESEND_MS:
                self._out.append(WriteDeadLetter(letter=letter))

    def _send_intents(self, now_ms: int) -> None:
        intents = self._book.collect(self.state, self.pool, self.term, self.name, now_ms)
        self._out.extend(SendIntent(intent=intent) for intent in intents)

    def _publish(self, now_ms: int) -> None:
        """Depth at a period, a change of admission at once."""
        periodic = now_ms >= self._publish_ms
        if periodic:
            self._publish_ms = now_ms + QUEUE_STATE_MS
        for queue in self._policies:
            state = self._queue_state(queue)
            last = self._published.get(queue)
            changed = last is None or state.admitting != last.admitting
            if changed or (periodic and state != last):
                self._published[queue] = state
                self._out.append(PublishQueueState(state=state))

    def _queue_state(self, queue: str) -> QueueState:
        counters = self.state.queues.get(queue) or QueueCounters()
        reason = self._inbox.why_not_admitting(queue, counters)
        return QueueState(
            pool=self.pool, queue=queue, term=self.term, admitting=not reason,
            pending=counters.pending, running=counters.running,
            unread=self._backlog.get(queue, 0) + self._inbox.waiting(queue), reason=reason,
        )  # fmt: skip
