"""The ledger: decisions, in the one order that is the truth (DESIGN, idea 2).

One Kafka record is one `LedgerEntry`: a batch of decisions made by one step of one leader in one
term. An entry is valid or void as a whole (`dataplane.core.validity`). Decisions are past facts.
"""

from typing import Final, Literal

import msgspec

from idl.jobs import JobSpec, LimitName, PayloadLocation, SourceRef
from idl.members import CoordinatorPeer
from idl.records import Command, Outcome
from idl.topology import GpuShare, Topology

LEDGER_VERSION: Final = 1

PendingCode = Literal["NoMatchingNode", "NoNodes", "BackingOff"]


class Capacity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node offers to jobs; `gpus` are indices known to the node's topology: healthy ones,
    whole or in MIG parts."""

    cpu_millis: int
    memory_bytes: int
    gpus: tuple[int, ...] = ()


class _Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    pass


class TermStarted(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="term_started"):
    """First record of a leader. Valid only if the entry's term exceeds every term before it."""

    pool: str
    previous_term: int
    why: str = ""


class Ingested(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="ingested"):
    """A submission was accepted. `job.id` is set; the payload stays in Kafka at `payload`."""

    queue: str
    source: SourceRef
    job: JobSpec
    payload: PayloadLocation | None = None


class Rejected(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="rejected"):
    """A submission was refused. It also goes to the dead letter, unless it is a duplicate."""

    queue: str
    source: SourceRef
    job: str
    code: str
    reason: str


class NodeSeen(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="node_seen"):
    """A node joined, came back as a new incarnation, or changed what it offers."""

    node: str
    incarnation: int
    capacity: Capacity
    enforces: tuple[LimitName, ...]
    labels: dict[str, str] = {}
    draining: bool = False
    drain_reason: str = ""
    topology: Topology = Topology()
    simulated: bool = False
    images: dict[str, str] = {}


class NodeLost(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="node_lost"):
    """A node is gone: its resources leave the pool, its attempts are released as `node_lost`."""

    node: str
    incarnation: int
    reason: str


class Assigned(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="assigned"):
    """A job's next attempt was placed.

    Reserved on that node: `gpus` (whole, by index), `mig` (instances, by UUID), `share` (of one
    GPU), `cpus` (whole cores for this attempt alone), `mems` (the NUMA domain that its CPUs and
    memory are from). Empty: none, any.
    `lease_ms`: length of every lease of an exclusive job's attempt, whoever leads; else 0.
    """

    job: str
    attempt: int
    node: str
    incarnation: int
    gpus: tuple[int, ...] = ()
    mig: tuple[str, ...] = ()
    share: GpuShare | None = None
    cpus: tuple[int, ...] = ()
    mems: tuple[int, ...] = ()
    lease_ms: int = 0


class Started(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="started"):
    """The node said that the attempt runs."""

    job: str
    attempt: int


class Released(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="released"):
    """The attempt's end is confirmed (result record `source`) or its node is lost (no source).

    Its resources return here (invariant 5); without a source only with `Vacated`, or with the
    node's next incarnation, for the node may hold it still.
    """

    job: str
    attempt: int
    outcome: Outcome
    detail: str = ""
    exit_code: int | None = None
    source: SourceRef | None = None


class LeaseAwaited(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="lease_awaited"):
    """An exclusive attempt is given up, and released without a result once its last lease must have
    ended: at `until_ms` by the clock of the leader of this entry's term (ADR 0011)."""

    job: str
    attempt: int
    until_ms: int


class LeadConfirmed(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="lead_confirmed"):
    """Changes nothing: read back as valid it proves to its leader that it still led when it was
    appended, which is what leases are renewed upon. `leases`: exclusive attempts that are out."""

    leases: int


class Vacated(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="vacated"):
    """The node no longer holds attempts of this incarnation that were given up without a result
    (job, attempt): their room returns."""

    node: str
    incarnation: int
    attempts: tuple[tuple[str, int], ...]


class ResultRefused(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="result_refused"):
    """A result that counts for nothing: not from the current attempt (invariant 3)."""

    job: str
    attempt: int
    source: SourceRef
    reason: str


class Finished(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="finished"):
    """The job succeeded; the result record of this attempt is its one result."""

    job: str
    attempt: int


class RetryScheduled(
    _Decision, frozen=True, kw_only=True, omit_defaults=True, tag="retry_scheduled"
):
    """Another attempt will be made, not before `not_before_ms` (leader's clock, epoch ms)."""

    job: str
    attempt: int
    reason: str
    not_before_ms: int


class DeadLettered(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="dead_lettered"):
    """The job ended without a result: attempts or time ran out."""

    job: str
    code: str
    reason: str


class DeadLetterStored(
    _Decision, frozen=True, kw_only=True, omit_defaults=True, tag="dead_letter_stored"
):
    """The dead-letter record of a job (`job`) or of a refused submission (`source`) is in Kafka."""

    key: str


class Cancelled(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="cancelled"):
    """The job ended because somebody asked for it, and nothing of it runs any more."""

    job: str
    by: str = ""


class Commanded(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="commanded"):
    """An operator's command was read: carried out, or refused with a reason."""

    source: SourceRef
    command: Command | None
    by: str = ""
    refused: str = ""


class Waiting(_Decision, frozen=True, kw_only=True, omit_defaults=True, tag="waiting"):
    """Why a pending job cannot be placed for now; recorded when the reason changes."""

    job: str
    code: PendingCode
    message: str


class MembersChanged(
    _Decision, frozen=True, kw_only=True, omit_defaults=True, tag="members_changed"
):
    """The membership from here on: exactly one was `added` or `removed` (ADR 0012).

    `version` counts the changes from 1; before the first the cluster file's list is in force.
    """

    version: int
    members: tuple[CoordinatorPeer, ...]
    added: str = ""
    removed: str = ""


Decision = (
    TermStarted | Ingested | Rejected | NodeSeen | NodeLost | Assigned | Started | Released
    | ResultRefused | Finished | RetryScheduled | DeadLettered | DeadLetterStored | Cancelled
    | Commanded | Waiting | MembersChanged | LeaseAwaited | LeadConfirmed | Vacated
)  # fmt: skip


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One appended batch. `at_ms`: the leader's clock (epoch ms) when it decided; `seq` counts the
    leader's entries in this term from 1."""

    v: int = LEDGER_VERSION
    term: int
    leader: str
    incarnation: int
    seq: int
    at_ms: int
    decisions: tuple[Decision, ...]
