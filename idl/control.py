"""Bodies of control messages (DDS). They are small; heavy data is in Kafka, by reference.

Each travels as JSON text in a signed envelope (`idl.envelope`, ADR 0003).
"""

from typing import Literal

import msgspec

from idl.jobs import JobSpec, LimitName, PayloadLocation
from idl.ledger import Capacity
from idl.members import CoordinatorPeer
from idl.topology import GpuShare, Topology


class _Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Ballot(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator → all coordinators. `renew` is the leader asking for its lease again.

    `members_version`: of the membership that the candidate counts votes by (ADR 0012).
    """

    kind: Literal["pre_vote", "vote", "renew"]
    role: str
    term: int
    candidate: str
    incarnation: int
    round: int
    members_version: int = 0


class BallotReply(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Voter → candidate (sent to all, dropped by others). `voter_term`: highest term it knows.

    `members_version`: of the membership that the voter has read in the ledger. `reaches_ledger`:
    whether the ledger's broker answers the voter; None where it did not ask.
    """

    kind: Literal["pre_vote", "vote", "renew"]
    role: str
    term: int
    candidate: str
    candidate_incarnation: int
    voter: str
    round: int
    granted: bool
    voter_term: int
    reason: str = ""
    members_version: int = 0
    reaches_ledger: bool | None = None


class Beacon(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Leader → all: who leads, until when, how far its ledger is. `kafka`: can it append?

    `state_digest`: hex, of its state at `ledger_offset` (`PoolState.digest`); "" before the first
    entry. `reason`, `successor`: with `stepping_down`, why, and who shall stand first ("": anyone).
    """

    role: str
    term: int
    leader: str
    incarnation: int
    lease_ms: int
    ledger_offset: int
    kafka: Literal["ok", "stalled"] = "ok"
    stepping_down: bool = False
    state_digest: str = ""
    kafka_stalled_since_ms: int = 0
    reason: str = ""
    successor: str = ""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Permission to run an exclusive attempt for `length_ms` from `since_ms`, a stamp of the node
    (`AttemptStatus.stamp_ms`): it ends by the node's own clock, and no delay makes it longer."""

    since_ms: int
    length_ms: int


class AssignIntent(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="assign",
                   omit_defaults=True):  # fmt: skip
    """Run this attempt. Devices and CPUs as `idl.ledger.Assigned` has them.

    An exclusive one runs only with a lease, and while it lasts (ADR 0011).
    """

    job: str
    attempt: int
    queue: str
    spec: JobSpec
    payload: PayloadLocation | None = None
    gpus: tuple[int, ...] = ()
    mig: tuple[str, ...] = ()
    share: GpuShare | None = None
    cpus: tuple[int, ...] = ()
    mems: tuple[int, ...] = ()
    lease: Lease | None = None


class RenewIntent(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="renew"):
    """The attempt's lease lasts until then now, unless it has run out already."""

    job: str
    attempt: int
    lease: Lease


class CancelIntent(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="cancel"):
    """Kill this attempt if it is there; its end is reported as any other (`killed`)."""

    job: str
    attempt: int
    why: str


class ForgetIntent(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="forget"):
    """The attempt's result is in the ledger: the node need not remember it."""

    job: str
    attempt: int


IntentItem = AssignIntent | CancelIntent | ForgetIntent | RenewIntent


class Intent(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Leader → one agent. Refused where `term` is older than the highest the agent has seen, or
    `node_incarnation` is not the agent's own.

    `members`: the coordinators at `members_version`, told to a node that does not know them yet.
    """

    pool: str
    node: str
    node_incarnation: int
    term: int
    leader: str
    items: tuple[IntentItem, ...]
    members_version: int = 0
    members: tuple[CoordinatorPeer, ...] = ()


AttemptPhase = Literal["accepted", "running", "ended"]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt as its node sees it. `ended`: the result is on its way to, or in, Kafka."""

    job: str
    attempt: int
    phase: AttemptPhase


class AttemptStatus(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Agent → leader. `full` lists every attempt the node knows (heartbeat); else what changed.

    It is the acknowledgement of intents: an assign is acknowledged by its attempt being listed,
    a forget or a cancel by the attempt being absent from a full list or `ended`.
    `members_version`: of the coordinators that the node knows; 0 for those of its cluster file.
    `stamp_ms`: the node's CLOCK_BOOTTIME when this was made, for leases; 0: none.
    """

    pool: str
    node: str
    incarnation: int
    term: int
    full: bool
    attempts: tuple[AttemptView, ...] = ()
    members_version: int = 0
    stamp_ms: int = 0


class NodePressure(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Share of the last ten seconds in which some task waited (PSI, `some avg10`), in per cent."""

    cpu: float = 0.0
    memory: float = 0.0
    io: float = 0.0


class NodeReport(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Agent → coordinators: what the node has, and what it can and cannot enforce.

    `draining`: the node takes no new work now, because of `drain_reason`; what runs, runs on.
    `simulated`: GPUs and domains are those of a described machine, not of this one.
    `images`: what jobs may have as their root, by name: a manifest's digest, or "directory".
    """

    pool: str
    node: str
    incarnation: int
    capacity: Capacity
    enforces: tuple[LimitName, ...]
    missing: dict[str, str] = {}
    sandbox: str = ""
    labels: dict[str, str] = {}
    topology: Topology = Topology()
    draining: bool = False
    drain_reason: str = ""
    simulated: bool = False
    pressure: NodePressure | None = None
    images: dict[str, str] = {}


class QueueState(_Body, frozen=True, kw_only=True, omit_defaults=True):
    """Leader → gateways, SDKs, console: one queue's depth and whether it admits."""

    pool: str
    queue: str
    term: int
    admitting: bool
    pending: int
    running: int
    unread: int
    reason: str = ""


ControlBody = Ballot | BallotReply | Beacon | Intent | AttemptStatus | NodeReport | QueueState
