"""The job spec: what a submitter produces to `queue.<queue>`, and where its payload lies.

The wire form is this Struct as msgpack or JSON (`content-type` header; `docs/submitting.md` and
`idl/schema/job.v1.json` for other languages). In JSON, bytes are base64.
"""

from typing import Final, Literal

import msgspec

from idl import limits as bound
from idl.errors import InvalidRecordError
from idl.ids import JobId, is_valid_name
from idl.units import MIB

JOB_VERSION: Final = 1

LimitName = Literal[
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time"
]
FailureKind = Literal["failed", "signalled", "timed_out", "out_of_memory", "platform", "node_lost"]


class Resources(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the scheduler reserves and the sandbox enforces."""

    cpu_millis: int = 1000
    memory_bytes: int = 256 * MIB
    gpus: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the sandbox enforces and nobody reserves."""

    wall_ms: int = 300_000
    grace_ms: int = 500
    pids_max: int = 128
    tmp_bytes: int = 64 * MIB
    work_bytes: int = 64 * MIB


class Retry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When and how a job gets another attempt.

    Timeouts and memory kills are left out by default: they tend to happen again.
    Delay before attempt n+1 is `min(backoff_ms * factor**(n-1), backoff_max_ms)`.
    """

    max_attempts: int = 3
    on: tuple[FailureKind, ...] = ("failed", "signalled", "platform", "node_lost")
    backoff_ms: int = 1_000
    factor: float = 2.0
    backoff_max_ms: int = 360_000


class Isolation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What must be enforced. A node that cannot enforce all of `require` never gets the job."""

    network: Literal["none", "host"] = "none"
    require: tuple[LimitName, ...] = (
        "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
    )  # fmt: skip


class PayloadRef(msgspec.Struct, frozen=True, kw_only=True):
    """Claim check: one record of the `payloads` topic. `sha256` is lower-case hex of the bytes."""

    partition: int
    offset: int
    size_bytes: int
    sha256: str


class SourceRef(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One Kafka record: full topic name, partition, offset."""

    topic: str
    partition: int
    offset: int


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One job. Everything but `command` has a default. See `validate_spec` for the bounds.

    `start_within_ms`: dead-letter the job if no attempt has started this long after ingestion
    (0: wait for ever). `group` names a set of jobs for `ls --group` and `cancel --group`.
    """

    v: int = JOB_VERSION
    id: str = ""
    name: str = ""
    group: str = ""
    command: tuple[str, ...]
    env: dict[str, str] = {}
    resources: Resources = Resources()
    limits: Limits = Limits()
    retry: Retry = Retry()
    isolation: Isolation = Isolation()
    node_labels: dict[str, str] = {}
    priority: int = 0
    start_within_ms: int = 0
    submitted_ms: int = 0
    submitter: str = ""
    payload: bytes | None = None
    payload_ref: PayloadRef | None = None


class PayloadLocation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an agent fetches a job's payload.

    Inline: `source` is the queue record and the bytes are its `payload` field.
    Claim check: `source` is the `payloads` record and the bytes are its value.
    """

    source: SourceRef
    size_bytes: int
    inline: bool
    sha256: str = ""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidRecordError("invalid-spec", message)


def _check_command(spec: JobSpec) -> None:
    _require(len(spec.command) > 0, "command is empty; give at least the program to run")
    _require(
        len(spec.command) <= bound.COMMAND_ARGUMENTS_MAX,
        f"command has {len(spec.command)} arguments, at most {bound.COMMAND_ARGUMENTS_MAX}; "
        "send long lists as payload",
    )
    words = (*spec.command, *spec.env.keys(), *spec.env.values())
    _require(not any("\0" in word for word in words), "command or env contains a NUL character")
    _require(bool(spec.command[0]), "command[0] is empty; it names the program to run")
    _require(
        all(key and "=" not in key for key in spec.env),
        "env has a name that is empty or contains '='",
    )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    _require(low <= value <= high, f"{name} is {value}; it must be between {low} and {high}")


def _check_numbers(spec: JobSpec) -> None:
    _check_range("resources.cpu_millis", spec.resources.cpu_millis, 10, bound.CPU_MILLIS_MAX)
    _check_range(
        "resources.memory_bytes",
        spec.resources.memory_bytes,
        bound.MEMORY_BYTES_MIN,
        bound.MEMORY_BYTES_MAX,
    )
    _check_range("resources.gpus", spec.resources.gpus, 0, bound.GPUS_MAX)
    _check_range("limits.wall_ms", spec.limits.wall_ms, 1, bound.WALL_MS_MAX)
    _check_range("limits.grace_ms", spec.limits.grace_ms, 0, 600_000)
    _check_range("limits.pids_max", spec.limits.pids_max, 1, 100_000)
    _check_range("limits.tmp_bytes", spec.limits.tmp_bytes, 1, bound.MEMORY_BYTES_MAX)
    _check_range("limits.work_bytes", spec.limits.work_bytes, 1, bound.MEMORY_BYTES_MAX)
    _check_range("retry.max_attempts", spec.retry.max_attempts, 1, bound.ATTEMPTS_MAX)
    _check_range("retry.backoff_ms", spec.retry.backoff_ms, 0, bound.WALL_MS_MAX)
    _check_range("retry.backoff_max_ms", spec.retry.backoff_max_ms, 0, bound.WALL_MS_MAX)
    _require(1.0 <= spec.retry.factor <= 100.0, "retry.factor must be between 1 and 100")
    _check_range("priority", spec.priority, -bound.PRIORITY_MAX, bound.PRIORITY_MAX)
    _check_range("start_within_ms", spec.start_within_ms, 0, bound.WALL_MS_MAX)


def validate_spec(spec: JobSpec) -> None:
    """Checks what the types cannot. Raises InvalidRecordError with the first thing wrong."""
    if spec.v != JOB_VERSION:
        raise InvalidRecordError(
            "unknown-version", f"job record version {spec.v} is not known; send v={JOB_VERSION}"
        )
    for field, name in (("id", spec.id), ("group", spec.group)):
        _require(
            not name or is_valid_name(name),
            f"{field} {name[:40]!r} is not a name; use letters, digits, '.', '_', '-', at most 128",
        )
    _check_command(spec)
    _check_numbers(spec)
    _require(
        spec.payload is None or spec.payload_ref is None,
        "payload and payload_ref are both set; send the bytes inline or by claim check, not both",
    )
    if spec.payload_ref is not None:
        _check_range("payload_ref.size_bytes", spec.payload_ref.size_bytes, 0,
                     bound.PAYLOAD_BYTES_MAX)  # fmt: skip
        _check_range("payload_ref.offset", spec.payload_ref.offset, 0, 2**62)


def without_payload(spec: JobSpec, job: JobId) -> JobSpec:
    """The spec as the ledger and intents carry it: identified, its payload left in Kafka."""
    return msgspec.structs.replace(spec, id=job, payload=None, payload_ref=None)
