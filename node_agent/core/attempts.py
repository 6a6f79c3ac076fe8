"""The agent's state machine: intents in, attempts run, statuses out. Pure (STYLE, habit 1).

Fencing (DESIGN, ideas 2 and 6): an intent of an older term, or one addressed to another incarnation
of this node, is refused; an attempt runs at most once; what ended is remembered until the leader
says `forget`, so a re-sent assign never runs anything twice. An exclusive attempt runs while its
lease lasts by the node's own clock; a lease that has run out is never extended (ADR 0011).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from idl.control import (
    AssignIntent,
    AttemptPhase,
    AttemptStatus,
    AttemptView,
    CancelIntent,
    ForgetIntent,
    Intent,
    IntentItem,
    Lease,
    RenewIntent,
)
from idl.errors import InvariantBrokenError
from idl.jobs import required_limits
from idl.ledger import Capacity
from idl.members import Members
from idl.records import Outcome

ENDED_REMEMBERED_MAX: Final = 50_000
"""Ended attempts kept for a leader that is away; beyond, the oldest are forgotten (their results
are in Kafka, and their attempt numbers void any second run's result)."""

LEASE_RAN_OUT: Final = "lease ran out: no leader renewed it in time"

Key = tuple[str, int]
"""(job, attempt)."""


class Phase(StrEnum):
    """Where an attempt is on this node."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    REPORTING = "reporting"
    ENDED = "ended"


TRANSITIONS: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.ACCEPTED: frozenset({Phase.RUNNING, Phase.REPORTING}),
    Phase.RUNNING: frozenset({Phase.REPORTING}),
    Phase.REPORTING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset(),
}
HOLDING: Final = (Phase.ACCEPTED, Phase.RUNNING)
"""Phases in which an attempt holds the node's resources."""


class IntentReceived(msgspec.Struct, frozen=True, tag=True):
    """An authenticated intent arrived."""

    intent: Intent


class AttemptRunning(msgspec.Struct, frozen=True, tag=True):
    """The job's own program was started."""

    job: str
    attempt: int


class AttemptEnded(msgspec.Struct, frozen=True, tag=True):
    """Nothing of the attempt is left on the node; its result is on the way to Kafka."""

    job: str
    attempt: int


class ResultDelivered(msgspec.Struct, frozen=True, tag=True):
    """Kafka acknowledged the attempt's result."""

    job: str
    attempt: int


class HeartbeatDue(msgspec.Struct, frozen=True, tag=True):
    """Time for a full status."""


class LeaseDue(msgspec.Struct, frozen=True, tag=True):
    """A lease may have run out; every other event looks as well."""


Event = IntentReceived | AttemptRunning | AttemptEnded | ResultDelivered | HeartbeatDue | LeaseDue


class RunAttempt(msgspec.Struct, frozen=True, tag=True):
    """Fetch the payload, run it in a sandbox, deliver the result. `lease_until_ms`: CLOCK_BOOTTIME
    at which an exclusive attempt must end unless its lease is extended; else 0."""

    assign: AssignIntent
    term: int
    lease_until_ms: int = 0


class KillAttempt(msgspec.Struct, frozen=True, tag=True):
    """End it now."""

    job: str
    attempt: int
    why: str


class ExtendLease(msgspec.Struct, frozen=True, tag=True):
    """The attempt may run until then (CLOCK_BOOTTIME)."""

    job: str
    attempt: int
    until_ms: int


class EndLease(msgspec.Struct, frozen=True, tag=True):
    """The attempt's lease has run out: end it now, without grace, whatever it takes."""

    job: str
    attempt: int


class RefuseAttempt(msgspec.Struct, frozen=True, tag=True):
    """Deliver a result without running anything: the node cannot hold what the job requires."""

    assign: AssignIntent
    term: int
    outcome: Outcome
    detail: str


class ForgetAttempt(msgspec.Struct, frozen=True, tag=True):
    """Nothing of it need be kept."""

    job: str
    attempt: int


class SendStatus(msgspec.Struct, frozen=True, tag=True):
    """Tell this coordinator, the leader as far as we know; "": tell all of them."""

    status: AttemptStatus
    to: str = ""


class FollowMembers(msgspec.Struct, frozen=True, tag=True):
    """The coordinators are others than in the cluster file: call these."""

    members: Members


Effect = (
    RunAttempt | KillAttempt | RefuseAttempt | ForgetAttempt | SendStatus | FollowMembers
    | ExtendLease | EndLease
)  # fmt: skip


class Restored(msgspec.Struct, frozen=True):
    """An attempt that an earlier process of this agent knew. `assign` is None once it ended."""

    assign: AssignIntent | None
    phase: Phase
    lease_until_ms: int = 0


class _Attempt(msgspec.Struct):
    phase: Phase
    lease_until_ms: int = 0


class AgentCore:
    """One per agent process; `step` is the only way in."""

    def __init__(
        self,
        pool: str,
        node: str,
        incarnation: int,
        capacity: Capacity,
        enforces: frozenset[str],
    ) -> None:
        self.pool = pool
        self.node = node
        self.incarnation = incarnation
        self.capacity = capacity
        self._ever_offered = set(capacity.gpus)
        self.enforces = enforces
        self.closed = ""
        """Why nothing new is taken now; "": it is."""
        self.term = 0
        self.members_version = 0
        """Of the coordinators that this process knows; 0: those of its cluster file."""
        self.leader = ""
        """Whose intent was taken last; "" before the first."""
        self.refused_intents: dict[str, int] = {}
        self._attempts: dict[Key, _Attempt] = {}
        self._live: dict[Key, AssignIntent] = {}
        self._changed: dict[Key, AttemptPhase] = {}
        self._leased: dict[Key, _Attempt] = {}
        """Exclusive attempts that hold resources and were not told yet that their lease is over."""
        self._now_ms = 0

    def restore(self, attempts: Mapping[Key, Restored], term: int) -> None:
        """Starts where an earlier process of this node's incarnation was; before any `step`."""
        self.term = term
        for key, restored in attempts.items():
            found = self._attempts[key] = _Attempt(restored.phase, restored.lease_until_ms)
            if restored.phase in HOLDING and restored.assign is not None:
                self._live[key] = restored.assign
                if restored.assign.spec.exclusive:
                    self._leased[key] = found

    def step(self, event: Event, now_ms: int) -> tuple[Effect, ...]:
        """Takes one fact, returns what to do. `now_ms`: the node's CLOCK_BOOTTIME.

        Raises InvariantBrokenError on an impossible fact.
        """
        self._now_ms = now_ms
        over = self._end_leases()
        return (*over, *self._take(event)) if over else self._take(event)

    @property
    def next_lease_end_ms(self) -> int:
        """When `LeaseDue` is due; 0: never."""
        return min((attempt.lease_until_ms for attempt in self._leased.values()), default=0)

    def _end_leases(self) -> list[Effect]:
        over = [key for key, a in self._leased.items() if a.lease_until_ms <= self._now_ms]
        for key in over:
            del self._leased[key]
        return [EndLease(*key) for key in over]

    def _take(self, event: Event) -> tuple[Effect, ...]:
        match event:
            case IntentReceived(intent=intent):
                return self._take_intent(intent)
            case AttemptRunning(job=job, attempt=attempt):
                self._move((job, attempt), Phase.RUNNING)
            case AttemptEnded(job=job, attempt=attempt):
                self._move((job, attempt), Phase.REPORTING)
            case ResultDelivered(job=job, attempt=attempt):
                self._move((job, attempt), Phase.ENDED)
                return self._forget_surplus()
            case HeartbeatDue():
                self._changed.clear()
                return (SendStatus(self._status(full=True, views=self._views())),)
        return ()

    def flush(self) -> tuple[Effect, ...]:
        """A delta status of what changed since the last one; call once per batch of events.

        It is for the leader alone: one who led before us and hears nothing, or leads now and we do
        not know it yet, has the full status of the next heartbeat.
        """
        if not self._changed:
            return ()
        views = tuple(
            AttemptView(job=job, attempt=attempt, phase=phase)
            for (job, attempt), phase in self._changed.items()
        )
        self._changed.clear()
        return (SendStatus(self._status(full=False, views=views), self.leader),)

    @property
    def has_news(self) -> bool:
        """`flush` has something to say."""
        return bool(self._changed)

    @property
    def live(self) -> tuple[AssignIntent, ...]:
        """Attempts that hold resources here: accepted or running."""
        return tuple(self._live.values())

    @property
    def known(self) -> dict[Key, Phase]:
        """Every attempt this node remembers."""
        return {key: attempt.phase for key, attempt in self._attempts.items()}

    def check_invariants(self) -> None:
        """What runs here never exceeds what the node offers (invariant 5). Raises."""
        cpu = sum(a.spec.resources.cpu_millis for a in self.live)
        memory = sum(a.spec.resources.memory_bytes for a in self.live)
        gpus = [gpu for a in self.live for gpu in a.gpus]
        if cpu > self.capacity.cpu_millis or memory > self.capacity.memory_bytes:
            raise InvariantBrokenError(f"node {self.node} over-committed: {cpu}m CPU, {memory} B")
        if len(gpus) != len(set(gpus)) or not set(gpus) <= self._ever_offered:
            raise InvariantBrokenError(f"node {self.node} gave a GPU twice: {gpus}")

    def _take_intent(self, intent: Intent) -> tuple[Effect, ...]:
        refusal = self._refusal(intent)
        if refusal:
            self.refused_intents[refusal] = self.refused_intents.get(refusal, 0) + 1
            return ()
        self.term = intent.term
        if not intent.members:  # of members standbys tell, too
            self.leader = intent.leader
        effects = [self._take_item(item) for item in intent.items]
        if intent.members and intent.members_version > self.members_version:
            self.members_version = intent.members_version
            effects.append(FollowMembers(intent.members))
        return tuple(effect for effect in effects if effect is not None)

    def _refusal(self, intent: Intent) -> str:
        if intent.node != self.node or intent.pool != self.pool:
            return "not-for-this-node"
        if intent.node_incarnation != self.incarnation:
            return "other-incarnation"
        if intent.term < self.term:
            return "older-term"
        return ""

    def _take_item(self, item: IntentItem) -> Effect | None:
        match item:
            case AssignIntent():
                return self._assign(item)
            case RenewIntent(job=job, attempt=attempt, lease=lease):
                return self._extend((job, attempt), lease)
            case CancelIntent(job=job, attempt=attempt, why=why):
                known = self._attempts.get((job, attempt))
                if known is not None and known.phase in HOLDING:
                    return KillAttempt(job, attempt, why)
            case ForgetIntent(job=job, attempt=attempt):
                known = self._attempts.get((job, attempt))
                if known is not None and known.phase is Phase.ENDED:
                    del self._attempts[job, attempt]
                    self._changed.pop((job, attempt), None)
                    return ForgetAttempt(job, attempt)
        return None

    def _assign(self, assign: AssignIntent) -> Effect | None:
        key = (assign.job, assign.attempt)
        if key in self._attempts:
            self._note(key)
            return self._extend(key, assign.lease)
        until_ms = self._lease_end(assign.lease)
        if assign.spec.exclusive and until_ms <= self._now_ms:
            self.refused_intents["lease-over"] = self.refused_intents.get("lease-over", 0) + 1
            return None  # it was long on its way; the leader tells us again, with a fresh one
        why_not = self._cannot_hold(assign)
        attempt = self._attempts[key] = _Attempt(Phase.ACCEPTED, until_ms)
        self._note(key)
        if why_not:
            return RefuseAttempt(assign, self.term, "platform", why_not)
        self._live[key] = assign
        if assign.spec.exclusive:
            self._leased[key] = attempt
        return RunAttempt(assign, self.term, until_ms)

    def _lease_end(self, lease: Lease | None) -> int:
        """CLOCK_BOOTTIME at which it ends, 0 for none. It began with our stamp, however long it was
        on its way; a stamp that we cannot have made yet counts as one made now."""
        return min(lease.since_ms, self._now_ms) + lease.length_ms if lease else 0

    def _extend(self, key: Key, lease: Lease | None) -> Effect | None:
        attempt, until_ms = self._leased.get(key), self._lease_end(lease)
        if attempt is None or until_ms <= attempt.lease_until_ms:
            return None  # over, or renewed by a later one
        attempt.lease_until_ms = until_ms
        return ExtendLease(*key, until_ms)

    def _cannot_hold(self, assign: AssignIntent) -> str:
        """Why this attempt must not run here, or "". The leader should have known; we make sure."""
        if self.closed:
            return f"node {self.node} takes no new work: {self.closed}"
        missing = sorted(set(required_limits(assign.spec)) - self.enforces)
        if missing:
            return f"node {self.node} cannot enforce {', '.join(missing)}"
        need, live = assign.spec.resources, self.live
        cpu = need.cpu_millis + sum(a.spec.resources.cpu_millis for a in live)
        memory = need.memory_bytes + sum(a.spec.resources.memory_bytes for a in live)
        if cpu > self.capacity.cpu_millis or memory > self.capacity.memory_bytes:
            return f"node {self.node} would be over-committed"
        taken = {gpu for a in live for gpu in a.gpus}
        shared = {a.share.gpu for a in live if a.share is not None}
        if (taken | shared) & set(assign.gpus) or not set(assign.gpus) <= set(self.capacity.gpus):
            return f"node {self.node} has no free GPU {assign.gpus}"
        if assign.share is not None and assign.share.gpu in taken:
            return f"GPU {assign.share.gpu} of node {self.node} is not shared now"
        if {uuid for a in live for uuid in a.mig} & set(assign.mig):
            return f"node {self.node} has no free MIG instance {', '.join(assign.mig)}"
        if pinned_cpus(assign) & {cpu for a in live for cpu in pinned_cpus(a)}:
            return f"CPUs {assign.cpus} of node {self.node} are another attempt's"
        return ""

    def close(self, reason: str) -> None:
        """From now on new attempts are refused, with this reason ("": they are taken again)."""
        self.closed = reason

    def offer(self, capacity: Capacity) -> None:
        """The node offers something else from now on; what runs, runs on."""
        self.capacity = capacity
        self._ever_offered |= set(capacity.gpus)

    def _move(self, key: Key, phase: Phase) -> None:
        attempt = self._attempts.get(key)
        if attempt is None or phase not in TRANSITIONS[attempt.phase]:
            was = attempt.phase if attempt is not None else "unknown"
            raise InvariantBrokenError(f"attempt {key[0]}.{key[1]}: {was} → {phase}")
        attempt.phase = phase
        if phase not in HOLDING:
            self._live.pop(key, None)
            self._leased.pop(key, None)
        self._note(key)

    def _note(self, key: Key) -> None:
        self._changed[key] = _view(self._attempts[key].phase)

    def _views(self) -> tuple[AttemptView, ...]:
        return tuple(
            AttemptView(job=job, attempt=number, phase=_view(attempt.phase))
            for (job, number), attempt in self._attempts.items()
        )

    def _status(self, *, full: bool, views: tuple[AttemptView, ...]) -> AttemptStatus:
        return AttemptStatus(
            pool=self.pool,
            node=self.node,
            incarnation=self.incarnation,
            term=self.term,
            full=full,
            attempts=views,
            members_version=self.members_version,
            stamp_ms=self._now_ms,
        )

    def _forget_surplus(self) -> tuple[Effect, ...]:
        if len(self._attempts) <= ENDED_REMEMBERED_MAX:
            return ()
        for key, attempt in self._attempts.items():
            if attempt.phase is Phase.ENDED:
                del self._attempts[key]
                return (ForgetAttempt(*key),)
        return ()


def pinned_cpus(assign: AssignIntent) -> frozenset[int]:
    """CPUs that are this attempt's alone; `cpus` of others is where they may run."""
    exclusive = assign.spec.resources.cpu_pinning == "cores"
    return frozenset(assign.cpus) if exclusive else frozenset()


def _view(phase: Phase) -> AttemptPhase:
    if phase is Phase.ACCEPTED:
        return "accepted"
    return "running" if phase is Phase.RUNNING else "ended"
