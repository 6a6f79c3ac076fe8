"""Kafka records other than job specs and the ledger: results, logs, commands, dead letters."""

from typing import Final, Literal

import msgspec

from idl.jobs import PayloadRef, SourceRef
from idl.members import CoordinatorPeer

RECORD_VERSION: Final = 1

Outcome = Literal[
    "succeeded", "failed", "signalled", "timed_out", "out_of_memory",
    "killed", "platform", "node_lost",
]  # fmt: skip
"""How an attempt ended. `failed`: non-zero exit; `platform`: ours or the node's fault;
`killed`: on our order; `node_lost`: never reported by the node, decided by the leader, or ended by
the node because it heard of no leader (an exclusive job whose lease ran out)."""


class Pressure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Time during which some task of the attempt waited for a resource (PSI, `some total`), µs."""

    cpu_us: int = 0
    memory_us: int = 0
    io_us: int = 0


class MemoryEvents(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How often the attempt met a memory boundary (cgroup-v2: memory.events)."""

    low: int = 0
    high: int = 0
    max: int = 0
    oom: int = 0
    oom_kill: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an attempt used; 0 or None where the node could not measure it.

    `throttled_ms`: time its CPU share made it wait. `pids_peak`: most tasks at once, init included.
    """

    wall_ms: int = 0
    cpu_ms: int = 0
    memory_peak_bytes: int = 0
    cpu_user_ms: int | None = None
    cpu_system_ms: int | None = None
    throttled_ms: int | None = None
    pids_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pressure: Pressure | None = None
    memory_events: MemoryEvents | None = None


class OutputFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One collected file: inline in `data`, or the `payloads` record `ref`.

    `name`: its path below /work; bytes that are no printable UTF-8, and '%', stand as %XX.
    """

    name: str
    size_bytes: int
    sha256: str
    data: bytes | None = None
    ref: PayloadRef | None = None


class AttemptResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One record of `results` per attempt, written by the agent. Times are epoch ms of its clock.

    The job's own bytes (what it wrote to $OUTRIDER_RESULT) are inline in `result` or, above
    RESULT_INLINE_BYTES_MAX, in the `payloads` record `result_ref`. `outputs`: the collected files;
    `outputs_missing`: what was asked for or found and not collected, and why.
    """

    v: int = RECORD_VERSION
    job: str
    attempt: int
    node: str
    term: int
    outcome: Outcome
    detail: str = ""
    exit_code: int | None = None
    signal: int | None = None
    usage: Usage = Usage()
    assigned_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    stdout_tail: bytes = b""
    stderr_tail: bytes = b""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    output_truncated: bool = False
    result: bytes | None = None
    result_ref: PayloadRef | None = None
    log: SourceRef | None = None
    outputs: tuple[OutputFile, ...] = ()
    outputs_missing: dict[str, str] = {}


class LogChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of output; `seq` counts from 0 within (job, attempt)."""

    v: int = RECORD_VERSION
    job: str
    attempt: int
    seq: int
    stream: Literal["stdout", "stderr"]
    at_ms: int
    data: bytes


class CancelJob(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="cancel_job"):
    """End a job: at once when it is pending, after its attempt was killed when it runs."""

    job: str


class DrainNode(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="drain_node"):
    """Place nothing more on a node (`drain`), or place there again (`drain=False`)."""

    node: str
    drain: bool = True


class TransferLeader(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="transfer_leader"
):
    """The leader steps down once this is in the ledger; `to` stands first, "" leaves it to rank."""

    to: str = ""


class AddMember(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="add_member"):
    """One more coordinator (ADR 0012). Its process should run already: it follows the leader."""

    member: CoordinatorPeer


class RemoveMember(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="remove_member"):
    """One coordinator less; a leader that is removed hands over."""

    name: str


Command = CancelJob | DrainNode | TransferLeader | AddMember | RemoveMember


class CommandRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One record of `commands`."""

    v: int = RECORD_VERSION
    by: str = ""
    at_ms: int = 0
    command: Command


class AttemptStory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt as the dead letter tells it."""

    attempt: int
    node: str
    outcome: Outcome
    detail: str = ""
    exit_code: int | None = None
    result: SourceRef | None = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One record of `dead-letter`: the original bytes, every attempt, and why.

    `original` is None only when Kafka no longer holds the submission; `source` still names it.
    """

    v: int = RECORD_VERSION
    key: str
    queue: str
    job: str
    code: str
    reason: str
    at_ms: int
    source: SourceRef
    original: bytes | None = None
    content_type: str = ""
    attempts: tuple[AttemptStory, ...] = ()
