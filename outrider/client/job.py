"""A job as people write it (`cpu="500m"`, `timeout="30s"`) and its way to the wire form.

Everything here is pure but for reading a payload or script given as a `Path`, and
`$OUTRIDER_ALLOW_UNENFORCED`.
"""

import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, cast, get_args

import msgspec

from idl import limits as bound
from idl.errors import ConfigError
from idl.ids import JobId, QueueName, is_valid_name
from idl.jobs import (
    FailureKind,
    Isolation,
    JobInput,
    JobSpec,
    LimitName,
    Limits,
    PayloadRef,
    Profile,
    Resources,
    Retry,
    validate_spec,
)
from idl.units import format_bytes, parse_bytes, parse_cpu_millis, parse_ms

DEFAULT_QUEUE: Final = QueueName("default")
ALL_LIMITS: Final[tuple[LimitName, ...]] = get_args(LimitName)
ALL_PROFILES: Final[tuple[Profile, ...]] = get_args(Profile)
REQUIRED_DEFAULT: Final = Isolation().require
ALL_FAILURES: Final[tuple[FailureKind, ...]] = get_args(FailureKind)

ALLOW_UNENFORCED_VARIABLE: Final = "OUTRIDER_ALLOW_UNENFORCED"
"""Limits, by comma, that jobs of this shell do without: for a laptop whose agent is not root."""

SCRIPT_INTERPRETERS: Final[Mapping[str, tuple[str, ...]]] = {
    "sh": ("-s", "--"), "bash": ("-s", "--"), "dash": ("-s", "--"), "ksh": ("-s", "--"),
    "zsh": ("-s", "--"), "python": ("-",), "python3": ("-",), "perl": ("-",), "ruby": ("-",),
    "node": ("-",), "Rscript": ("-",), "lua": ("-",), "php": ("--",),
}  # fmt: skip
"""How each interpreter is told to read its program from stdin; arguments follow."""

Quantity = str | int | float
InputSource = bytes | str | Path | PayloadRef | JobInput
"""What an input may be given as."""


class Submission(NamedTuple):
    """What is produced: a queue and a wire spec that passed `validate_spec`."""

    queue: QueueName
    spec: JobSpec


@dataclass(frozen=True)
class Job:
    """One job.

    `command`: argv, or one string that is split into words like a shell does (no shell runs).
    `script`: a program (text or `Path`) that travels as the payload and is read from stdin by the
    interpreter its first line names (`sh` without one); `args` are its arguments.
    `payload`: what the job reads from stdin: bytes, text (UTF-8) or the `Path` of a file.
    Sizes: `"256Mi"`, bytes; `cpu`: `2`, `0.5` or `"500m"`; durations: `"30s"`, or seconds.
    `gpus`: whole ones, or MIG instances of `gpu_profile` (`"1g.5gb"`); `gpu_model`: part of the
    product name; `gpu_memory`: at least, each; `gpu_links`: `"nvlink"` wants them connected.
    `gpu_share` (`0.25` or `"250m"` of one GPU) and `gpu_share_memory` take a part of one instead.
    `cpu_pinning`: `"cores"` gives whole cores; `numa`: `"single"` keeps all in one domain.
    `retries`: attempts after the first. `require`: what a node must enforce to get the job;
    `allow_unenforced` takes names out of it. `start_within`: dead-letter the job when no attempt
    has started this long after it was accepted (0: wait for ever). `cpu_time`, `idle`: end the job
    after so much CPU time, or so long without output and CPU time. `io_read`, `io_write`: bytes a
    second. `log`: how much of stdout and stderr is kept.
    `inputs`: files below `/work/in` before the start, by name: bytes, text, a `Path`, the claim
    check of an earlier job's output (`OutputFile.ref`), or a `JobInput` (`writable=True`: below
    `/work`). `outputs`: files below `/work` to keep: `report.txt`, `plots/`, `plots/*.png`.
    `image`: the name of an image that the operator of a node has configured: the job's read-only
    root instead of the host's (`outrider nodes` shows who has which).
    `exclusive`: never two
    attempts at once, at the price that the job is killed where its node hears of no leader for
    longer than a lease (docs/operating.md).
    """

    command: Sequence[str] | str = ()
    _: KW_ONLY
    id: str = ""
    name: str = ""
    group: str = ""
    queue: str = DEFAULT_QUEUE
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    payload: bytes | str | Path | None = None
    script: str | Path | None = None
    cpu: Quantity = 1
    memory: Quantity = "256Mi"
    gpus: int = 0
    gpu_model: str = ""
    gpu_memory: Quantity = 0
    gpu_profile: str = ""
    gpu_links: str = "any"
    gpu_share: Quantity = 0
    gpu_share_memory: Quantity = 0
    cpu_pinning: str = "shared"
    numa: str = "any"
    timeout: Quantity = "5m"
    grace: Quantity = "500ms"
    pids: int = 128
    tmp: Quantity = "64Mi"
    work: Quantity = "64Mi"
    retries: int = 2
    retry_on: Sequence[FailureKind] = ("failed", "signalled", "platform", "node_lost")
    backoff: Quantity = "1s"
    backoff_factor: float = 2.0
    backoff_max: Quantity = "6m"
    cpu_time: Quantity = 0
    idle: Quantity = 0
    swap: Quantity = 0
    io_read: Quantity = 0
    io_write: Quantity = 0
    shm: Quantity = "64Mi"
    log: Quantity = "1Mi"
    open_files: int = 1024
    tmp_inodes: int = 16_384
    work_inodes: int = 16_384
    inputs: Mapping[str, InputSource] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    profile: str = "strict"
    network: str = "none"
    require: Sequence[LimitName] = REQUIRED_DEFAULT
    allow_unenforced: Sequence[LimitName] = ()
    node_labels: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    priority: int = 0
    start_within: Quantity = 0
    exclusive: bool = False

    def submission(self) -> Submission:
        """The wire form. Raises ConfigError (how it is written), InvalidRecordError (bounds)."""
        if not is_valid_name(self.queue):
            raise ConfigError(f"queue {self.queue!r} is not a name; use letters, digits, . _ -")
        spec = _spec(self)
        check_text(spec)
        validate_spec(spec)
        return Submission(QueueName(self.queue), spec)


def shebang_command(script: bytes) -> tuple[str, ...]:
    """The argv that runs `script` from its stdin. Raises ConfigError for unknown interpreters.

    `#!/usr/bin/env -S prog` and `#!/usr/bin/prog` name `prog`; without a first line it is `sh`.
    """
    first, _, _ = script.partition(b"\n")
    words = shlex.split(first[2:].decode(errors="replace")) if first.startswith(b"#!") else ["sh"]
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if word != "-S"]
    if not words:
        raise ConfigError("the script's first line names no program; write e.g. #!/bin/sh")
    name = Path(words[0]).name
    stem = name.rstrip("0123456789.")
    tail = SCRIPT_INTERPRETERS.get(name) or SCRIPT_INTERPRETERS.get(stem)
    if tail is None:
        known = ", ".join(SCRIPT_INTERPRETERS)
        raise ConfigError(
            f"the script's interpreter {name!r} is not known to read a program from stdin "
            f"(known: {known}); give a command and send the script as --stdin"
        )
    return (*words, *tail)


def _read(source: bytes | str | Path, what: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        return read_file(source, what)
    try:
        return source.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text; give it as bytes") from error


def read_file(source: Path, what: str) -> bytes:
    """A file that travels with a job. Raises ConfigError: it cannot be read, or is too large."""
    try:
        size = source.stat().st_size
        if size > bound.PAYLOAD_BYTES_MAX:
            raise ConfigError(_too_large(what, size))
        return source.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {what} {source}: {error.strerror}") from error


def _too_large(what: str, size: int) -> str:
    return (
        f"{what} has {format_bytes(size)}, at most {format_bytes(bound.PAYLOAD_BYTES_MAX)} travel "
        "with a job; put larger input in an object store and send its address"
    )


def _command_and_payload(job: Job) -> tuple[tuple[str, ...], bytes | None]:
    command = tuple(shlex.split(job.command) if isinstance(job.command, str) else job.command)
    if job.script is None:
        payload = None if job.payload is None else _read(job.payload, "payload")
        command = (*command, *job.args)
    else:
        if command or job.payload is not None:
            raise ConfigError(
                "a job has either script, or command (and payload): a script is the payload, "
                "and its first line names the command"
            )
        payload = _read(job.script, "script")
        command = (*shebang_command(payload), *job.args)
    if not command:
        raise ConfigError("a job needs command (argv) or script")
    if payload is not None and len(payload) > bound.PAYLOAD_BYTES_MAX:
        raise ConfigError(_too_large("payload", len(payload)))
    return command, payload


def _input(name: str, given: InputSource) -> JobInput:
    if isinstance(given, JobInput):
        return given
    if isinstance(given, PayloadRef):
        return JobInput(ref=given)
    if not isinstance(given, bytes | str | Path):
        raise ConfigError(f"input {name!r} is bytes, text, a Path, a PayloadRef or a JobInput")
    data = _read(given, f"input {name!r}")
    if len(data) > bound.PAYLOAD_BYTES_MAX:
        raise ConfigError(_too_large(f"input {name!r}", len(data)))
    return JobInput(data=data)


def _limits(job: Job) -> Limits:
    return Limits(
        wall_ms=parse_ms(job.timeout),
        grace_ms=parse_ms(job.grace),
        pids_max=job.pids,
        tmp_bytes=parse_bytes(job.tmp),
        work_bytes=parse_bytes(job.work),
        cpu_ms=parse_ms(job.cpu_time),
        idle_ms=parse_ms(job.idle),
        swap_bytes=parse_bytes(job.swap),
        io_read_bytes_per_s=parse_bytes(job.io_read),
        io_write_bytes_per_s=parse_bytes(job.io_write),
        open_files_max=job.open_files,
        tmp_inodes=job.tmp_inodes,
        work_inodes=job.work_inodes,
        shm_bytes=parse_bytes(job.shm),
        output_bytes=parse_bytes(job.log),
    )


def _isolation(job: Job) -> Isolation:
    _known((job.network,), ("none", "host"), "network")
    _known((job.profile,), ALL_PROFILES, "profile")
    return Isolation(
        network="host" if job.network == "host" else "none",
        require=required_limits(job),
        profile=cast("Profile", job.profile),
    )


def _known(names: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} has {name!r}; it may have {', '.join(known)}")


def required_limits(job: Job) -> tuple[LimitName, ...]:
    """`require` without `allow_unenforced` and `$OUTRIDER_ALLOW_UNENFORCED`, in order."""
    _known(job.require, ALL_LIMITS, "require")
    from_environment = os.environ.get(ALLOW_UNENFORCED_VARIABLE, "").split(",")
    allowed = [*job.allow_unenforced, *(name.strip() for name in from_environment if name.strip())]
    _known(allowed, ALL_LIMITS, f"allow_unenforced or ${ALLOW_UNENFORCED_VARIABLE}")
    wanted = set(job.require) - set(allowed)
    return tuple(name for name in ALL_LIMITS if name in wanted)


def _check_lists(job: Job) -> None:
    """A string is a sequence of strings, too: of its characters, which nobody means."""
    for name in ("args", "outputs", "retry_on", "require", "allow_unenforced"):
        given = getattr(job, name)
        if isinstance(given, str | bytes):
            raise ConfigError(f"{name} is a list of strings, not the string {given!r}")
    if isinstance(job.command, bytes):
        raise ConfigError("command is a list of strings, or one string, not bytes")


def _spec(job: Job) -> JobSpec:
    _check_lists(job)
    command, payload = _command_and_payload(job)
    _known(job.retry_on, ALL_FAILURES, "retry_on")
    if job.retries < 0:
        raise ConfigError(f"retries is {job.retries}; it is 0 or more")
    built = JobSpec(
        id=job.id,
        name=job.name,
        group=job.group,
        command=command,
        env=dict(job.env),
        resources=Resources(
            cpu_millis=parse_cpu_millis(job.cpu),
            memory_bytes=parse_bytes(job.memory),
            gpus=job.gpus,
            gpu_model=job.gpu_model,
            gpu_memory_bytes_min=parse_bytes(job.gpu_memory),
            gpu_profile=job.gpu_profile,
            gpu_links=job.gpu_links,  # type: ignore[arg-type] # `_typed` looks
            gpu_share_millis=parse_cpu_millis(job.gpu_share),
            gpu_share_memory_bytes=parse_bytes(job.gpu_share_memory),
            cpu_pinning=job.cpu_pinning,  # type: ignore[arg-type] # `_typed` looks
            numa=job.numa,  # type: ignore[arg-type] # `_typed` looks
        ),
        limits=_limits(job),
        retry=Retry(
            max_attempts=job.retries + 1,
            on=tuple(job.retry_on),
            backoff_ms=parse_ms(job.backoff),
            factor=job.backoff_factor,
            backoff_max_ms=parse_ms(job.backoff_max),
        ),
        isolation=_isolation(job),
        node_labels=dict(job.node_labels),
        image=job.image,
        priority=job.priority,
        start_within_ms=parse_ms(job.start_within),
        exclusive=job.exclusive,
        payload=payload,
        inputs={name: _input(name, given) for name, given in job.inputs.items()},
        outputs=tuple(job.outputs),
    )
    return _typed(built)


def _typed(spec: JobSpec) -> JobSpec:
    """Checks the types that Python did not (env values, gpus, …) as a reader would."""
    try:
        return msgspec.convert(msgspec.to_builtins(spec, builtin_types=(bytes,)), JobSpec)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"job: {error}") from error


def check_text(spec: JobSpec) -> None:
    """Raises ConfigError where a text of the spec is not UTF-8, and so cannot be sent: a word of a
    command line may be any bytes, and JSON may hold half a character."""
    texts = msgspec.structs.replace(
        spec, payload=None, inputs={name: JobInput(data=b"") for name in spec.inputs}
    )
    try:
        msgspec.msgpack.encode(texts)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{error.object!r} is not UTF-8 text, as words, names and variables of a job are; "
            "send other bytes as payload or input"
        ) from error


def new_job_id(name: str = "") -> JobId:
    """A fresh id, `<name>-<60 random bits>`; `job-…` where the name cannot be part of an id."""
    stem = name if is_valid_name(name) and len(name) <= 64 else "job"
    return JobId(f"{stem}-{secrets.token_hex(8)[:15]}")


def identified(submission: Submission) -> Submission:
    """The same submission with an id; it is known before it is sent, so its end can be awaited."""
    spec = submission.spec
    if spec.id:
        return submission
    return submission._replace(spec=msgspec.structs.replace(spec, id=new_job_id(spec.name)))


def array(submission: Submission, count: int) -> list[Submission]:
    """`count` copies with ids `<id>-0 …` and `$OUTRIDER_ARRAY_INDEX`, in the group of that id."""
    if not 1 <= count <= ARRAY_JOBS_MAX:
        raise ConfigError(f"array of {count}; it may have 1 to {ARRAY_JOBS_MAX} jobs")
    base = submission.spec.id or new_job_id(submission.spec.name)
    size = {ARRAY_SIZE_VARIABLE: str(count)}
    members = [
        msgspec.structs.replace(
            submission.spec,
            id=f"{base}-{index}",
            group=submission.spec.group or base,
            env=submission.spec.env | size | {ARRAY_INDEX_VARIABLE: str(index)},
        )
        for index in range(count)
    ]
    for spec in members[-1:]:
        validate_spec(spec)
    return [submission._replace(spec=spec) for spec in members]


ARRAY_INDEX_VARIABLE: Final = "OUTRIDER_ARRAY_INDEX"
ARRAY_SIZE_VARIABLE: Final = "OUTRIDER_ARRAY_SIZE"
ARRAY_JOBS_MAX: Final = 100_000
"""One array is built in memory before it is sent; more jobs are several submissions."""
