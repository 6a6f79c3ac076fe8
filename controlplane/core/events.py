"""What happens to the cores (events: past facts) and what they order (effects: imperatives).

Two pure machines run in one coordinator process and share one driver:

* `Election` (`controlplane.core.election`) decides who *tries* to lead;
* `Coordinator` (`controlplane.core.coordinator`) folds the ledger and, while it leads, decides.

Both have `step(event, now_ms) -> tuple[effect, ...]`. `now_ms` is epoch milliseconds that never go
back within a process (epoch at start + monotonic time since): leases and timers depend on it.
The driver performs effects in the order given and never calls `step` from within an effect.
"""

from typing import Literal

import msgspec

from controlplane.core.membership import Voters
from idl.control import (
    AttemptStatus,
    Ballot,
    BallotReply,
    Beacon,
    Intent,
    NodeReport,
    QueueState,
)
from idl.jobs import JobSpec, PayloadLocation, SourceRef
from idl.ledger import LedgerEntry
from idl.members import Members
from idl.records import AttemptResult, CommandRecord, DeadLetter


class _Fact(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Tick(_Fact, frozen=True, kw_only=True):
    """Time passed: send one when `next_wakeup_ms` of the machine has come."""


# --- Election: events -----------------------------------------------------------------------


class BallotReceived(_Fact, frozen=True, kw_only=True):
    """Another coordinator asks for a (pre-)vote or for its lease again."""

    ballot: Ballot


class BallotReplyReceived(_Fact, frozen=True, kw_only=True):
    """A voter answered. Replies go to all; those for others are ignored here."""

    reply: BallotReply


class BeaconReceived(_Fact, frozen=True, kw_only=True):
    """A leader says that it leads."""

    beacon: Beacon


class PeerGone(_Fact, frozen=True, kw_only=True):
    """Hint: the process of `peer` is gone (its hint connection closed). Never a proof."""

    peer: str


class LedgerAdvanced(_Fact, frozen=True, kw_only=True):
    """The ledger as this process has applied it: highest valid term, next offset to read.

    `caught_up`: everything that was in the ledger when this process started has been applied;
    before that it does not stand for election (it would lead cold). `digest`: of the state there.
    `leader`: who started that term, "" for nobody.
    """

    term: int
    next_offset: int
    leader: str = ""
    caught_up: bool = True
    digest: str = ""


class KafkaShown(_Fact, frozen=True, kw_only=True):
    """The coordinator core said (`ShowKafka`) whether the ledger can be appended to."""

    stalled: bool


class StepDown(_Fact, frozen=True, kw_only=True):
    """Give the role up now: an operator or a shutdown asks, or the coordinator core resigned.

    `to`: who shall stand first; "" leaves it to rank.
    """

    reason: str
    to: str = ""


class Barred(_Fact, frozen=True, kw_only=True):
    """This process must not lead any more (its state differs from a leader's): it votes only."""

    reason: str


class LedgerProbed(_Fact, frozen=True, kw_only=True):
    """Answer to `ProbeLedger`: whether the broker of the ledger's partition answered in time."""

    reached: bool


class MembersAdopted(_Fact, frozen=True, kw_only=True):
    """The membership of the ledger was read (or recovered): from now on votes are counted by it."""

    version: int
    members: Members


ElectionEvent = (
    Tick | BallotReceived | BallotReplyReceived | BeaconReceived | PeerGone | LedgerAdvanced
    | KafkaShown | StepDown | Barred | MembersAdopted | LedgerProbed
)  # fmt: skip

# --- Election: effects ----------------------------------------------------------------------


class SendBallot(_Fact, frozen=True, kw_only=True):
    """Send to every other coordinator of the membership."""

    ballot: Ballot


class SendBallotReply(_Fact, frozen=True, kw_only=True):
    """Send to every other coordinator (only `candidate` acts on it)."""

    reply: BallotReply


class SendBeacon(_Fact, frozen=True, kw_only=True):
    """Send to everybody: coordinators, agents, consoles."""

    beacon: Beacon


class TakeRole(_Fact, frozen=True, kw_only=True):
    """Elected: hand `RoleWon(term, why)` to the coordinator core. `why`: what ended the term
    before, as far as this process knows."""

    term: int
    why: str = ""


class LoseRole(_Fact, frozen=True, kw_only=True):
    """No longer elected: hand `RoleLost(reason)` to the coordinator core."""

    reason: str


class ShowVoters(_Fact, frozen=True, kw_only=True):
    """Whom the leader hears: hand `VotersHeard` to the coordinator core."""

    voters: Voters


class ProbeLedger(_Fact, frozen=True, kw_only=True):
    """Ask the ledger's broker something that writes nothing, then report `LedgerProbed`."""


ElectionEffect = (
    SendBallot | SendBallotReply | SendBeacon | TakeRole | LoseRole | ShowVoters | ProbeLedger
)  # fmt: skip

# --- Coordinator: events --------------------------------------------------------------------


class RoleWon(_Fact, frozen=True, kw_only=True):
    """The election gave this process the role. It leads only once `TermStarted` is read back."""

    term: int
    why: str = ""


class RoleLost(_Fact, frozen=True, kw_only=True):
    """The election took the role away. What was undecided is dropped; Kafka still has it."""

    reason: str


class LedgerRead(_Fact, frozen=True, kw_only=True):
    """The next ledger record, in offset order, standby or leader alike. None may be skipped."""

    offset: int
    entry: LedgerEntry


class AppendFailed(_Fact, frozen=True, kw_only=True):
    """Appending entry `seq` of `term` failed or timed out; it may be in the log all the same.

    `retryable` False (e.g. not authorised, record refused): the role is given up.
    """

    term: int
    seq: int
    retryable: bool
    reason: str


class Submission(_Fact, frozen=True, kw_only=True):
    """One record of a queue topic, already decoded: `spec`, or the code and message of its error.

    `payload`: where an agent finds the payload (inline or claim check), None without payload.
    `key`: the Kafka key as text, "" where there is none or it is not UTF-8.
    """

    source: SourceRef
    queue: str
    key: str = ""
    timestamp_ms: int = 0
    spec: JobSpec | None = None
    payload: PayloadLocation | None = None
    error_code: str = ""
    error_message: str = ""


class ResultRead(_Fact, frozen=True, kw_only=True):
    """One record of the results topic: `result`, or the code and message of its error."""

    source: SourceRef
    key: str = ""
    result: AttemptResult | None = None
    error_code: str = ""
    error_message: str = ""


class CommandRead(_Fact, frozen=True, kw_only=True):
    """One record of the commands topic: `record`, or the code and message of its error."""

    source: SourceRef
    record: CommandRecord | None = None
    error_code: str = ""
    error_message: str = ""


class SubmissionsRead(_Fact, frozen=True, kw_only=True):
    """Records of queue topics, per partition in offset order.

    `term`: that of the `OpenIntake` under which they were read. Records of an earlier intake are
    ignored here, for a stale record ahead of the position would make us skip those between.
    """

    term: int
    submissions: tuple[Submission, ...]


class ResultsRead(_Fact, frozen=True, kw_only=True):
    """Records of the results topic, per partition in offset order. `term` as above."""

    term: int
    results: tuple[ResultRead, ...]


class CommandsRead(_Fact, frozen=True, kw_only=True):
    """Records of the commands topic, in offset order. `term` as above."""

    term: int
    commands: tuple[CommandRead, ...]


class NodeReported(_Fact, frozen=True, kw_only=True):
    """A node said what it has. Hand these to standbys as well: they keep the last one."""

    report: NodeReport


class StatusReported(_Fact, frozen=True, kw_only=True):
    """A node said what it runs. Hand these to standbys as well: they note who is alive."""

    status: AttemptStatus


class DeadLetterWritten(_Fact, frozen=True, kw_only=True):
    """The dead-letter record `key` is in Kafka (acknowledged)."""

    key: str


class BacklogMeasured(_Fact, frozen=True, kw_only=True):
    """Records of `queue` in Kafka that were not handed to the core yet (lag of the intake)."""

    queue: str
    unread: int


class LedgerStalled(_Fact, frozen=True, kw_only=True):
    """The broker of the ledger stopped to answer readers (or answers again): this shows a stall
    also to a leader that has nothing to append."""

    stalled: bool
    reason: str = ""


class StateClaimed(_Fact, frozen=True, kw_only=True):
    """A leader's beacon: it says where in the ledger it is and what its state is there."""

    beacon: Beacon


class VotersHeard(_Fact, frozen=True, kw_only=True):
    """Which members answer, and which of them know the newest membership (from the election)."""

    voters: Voters


CoordinatorEvent = (
    Tick | RoleWon | RoleLost | LedgerRead | AppendFailed | SubmissionsRead | ResultsRead
    | CommandsRead | NodeReported | StatusReported | DeadLetterWritten | BacklogMeasured
    | LedgerStalled | StateClaimed | VotersHeard
)  # fmt: skip

# --- Coordinator: effects -------------------------------------------------------------------


class Append(_Fact, frozen=True, kw_only=True):
    """Append to the pool's ledger (acks=all). Never more than one is wanted at a time.

    Success needs no event: the entry comes back as `LedgerRead`. The same entry may be ordered
    again after `AppendFailed`; a double append is void by its `seq`.
    """

    entry: LedgerEntry


class Position(_Fact, frozen=True, kw_only=True):
    """Next offset to read of one partition."""

    topic: str
    partition: int
    next_offset: int


class OpenIntake(_Fact, frozen=True, kw_only=True):
    """Start reading queues, results and commands at `positions`, all streams on.

    A partition that is not listed is read from its beginning. Events made from these records
    carry `term`.
    """

    term: int
    positions: tuple[Position, ...]


class CloseIntake(_Fact, frozen=True, kw_only=True):
    """Stop reading queues, results and commands."""


StreamKind = Literal["queue", "results", "commands"]


class SetIntake(_Fact, frozen=True, kw_only=True):
    """Pause (`on` False) or resume one stream; `queue` names the queue of a queue stream.

    After a pause at most one poll (RECORDS_PER_READ_MAX) of that stream may still be handed in.
    """

    stream: StreamKind
    on: bool
    queue: str = ""


class SendIntent(_Fact, frozen=True, kw_only=True):
    """Send to the agent `intent.node`. May get lost: it is re-sent until acknowledged."""

    intent: Intent


class WriteDeadLetter(_Fact, frozen=True, kw_only=True):
    """Produce to the dead-letter topic (key `letter.key`), then report `DeadLetterWritten`.

    `letter.original` is None: the driver reads the bytes at `letter.source` and fills it in with
    `content_type`. May be ordered twice for one key (takeover): the topic is at-least-once.
    """

    letter: DeadLetter


class PublishQueueState(_Fact, frozen=True, kw_only=True):
    """Publish one queue's depth and admission."""

    state: QueueState


class ShowKafka(_Fact, frozen=True, kw_only=True):
    """Show in state, metrics and beacon whether Kafka takes appends; also `KafkaShown`."""

    stalled: bool
    reason: str = ""


class Leading(_Fact, frozen=True, kw_only=True):
    """`TermStarted` was read back as valid: this process leads now (for logs and metrics)."""

    term: int


class Resign(_Fact, frozen=True, kw_only=True):
    """Give the role up: hand `StepDown(reason, to)` to the election. The core is a standby already.

    `to`: who shall have it next (an operator's order), "" for anybody.
    """

    reason: str
    to: str = ""


class ShowDivergence(_Fact, frozen=True, kw_only=True):
    """Our state and a leader's differ at the same place: show it loudly, and `Barred`."""

    reason: str


class AdoptMembers(_Fact, frozen=True, kw_only=True):
    """The ledger changed the membership: hand `MembersAdopted` to the election; hints, keys and
    DDS peers follow."""

    version: int
    members: Members


CoordinatorEffect = (
    Append | OpenIntake | CloseIntake | SetIntake | SendIntent | WriteDeadLetter
    | PublishQueueState | ShowKafka | Leading | Resign | ShowDivergence | AdoptMembers
)  # fmt: skip
