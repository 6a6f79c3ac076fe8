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
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
    "cpu_time", "io", "cpuset",
]  # fmt: skip
ON_DEMAND: Final[tuple[LimitName, ...]] = ("cpu_time", "io")
"""Limits that a node must enforce only for jobs that set them (`required_limits`)."""
HOST_NETWORK_LABEL: Final = {"host-network": "allowed"}
"""Label of nodes whose operator lets jobs use the host's network; such jobs go nowhere else."""
Profile = Literal["strict", "network", "gpu"]
FailureKind = Literal["failed", "signalled", "timed_out", "out_of_memory", "platform", "node_lost"]


class Resources(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the scheduler reserves and the sandbox enforces.

    `gpus`: whole GPUs, or MIG instances of `gpu_profile` (`1g.5gb`). Instead of whole ones, a part
    of one: `gpu_share_millis` of its time, `gpu_share_memory_bytes` of its memory, either alone.
    `gpu_model`: part of the product name, any case. `gpu_links`: `nvlink` wants them linked.
    `cpu_pinning`: `cores` gives whole cores to this job alone. `numa`: `single` takes CPUs, memory
    and GPUs from one domain. What of this is enforced and what is accounting: docs/topology.md.
    """

    cpu_millis: int = 1000
    memory_bytes: int = 256 * MIB
    gpus: int = 0
    gpu_model: str = ""
    gpu_memory_bytes_min: int = 0
    gpu_profile: str = ""
    gpu_links: Literal["any", "nvlink"] = "any"
    gpu_share_millis: int = 0
    gpu_share_memory_bytes: int = 0
    cpu_pinning: Literal["shared", "cores"] = "shared"
    numa: Literal["any", "single"] = "any"

    @property
    def any_gpu(self) -> bool:
        """Asks for GPUs: whole, in MIG parts, or a share of one."""
        return bool(self.gpus or self.gpu_share_millis or self.gpu_share_memory_bytes)

    @property
    def placed_by_cpu(self) -> bool:
        """Asks to be bound to some of the node's CPUs."""
        return self.cpu_pinning == "cores" or self.numa == "single"


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the sandbox enforces and nobody reserves. 0: no such limit, but for `swap_bytes`.

    `cpu_ms`: CPU time of the whole job. `idle_ms`: the longest time with next to no CPU time and
    no output. `swap_bytes`: beside the memory; 0 is none. `io_*`: bytes a second from and to each
    disk behind the visible file systems. `output_bytes`: of stdout and stderr, half for each.
    """

    wall_ms: int = 300_000
    grace_ms: int = 500
    pids_max: int = 128
    tmp_bytes: int = 64 * MIB
    work_bytes: int = 64 * MIB
    cpu_ms: int = 0
    idle_ms: int = 0
    swap_bytes: int = 0
    io_read_bytes_per_s: int = 0
    io_write_bytes_per_s: int = 0
    open_files_max: int = 1024
    tmp_inodes: int = 16_384
    work_inodes: int = 16_384
    shm_bytes: int = 64 * MIB
    output_bytes: int = bound.LOG_BYTES_MAX


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
    """What must be enforced. A node that cannot enforce all of `require` never gets the job.

    `profile` is a preset: `network` is `network="host"` without requiring its isolation; a job
    with GPUs has `gpu`, whatever it says (docs/isolation.md).
    """

    network: Literal["none", "host"] = "none"
    require: tuple[LimitName, ...] = (
        "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
        "cpu_time", "io",
    )  # fmt: skip
    profile: Profile = "strict"


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


class JobInput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file that is there before the job starts: small bytes, or a claim check.

    Its name is the path below `/work/in`, read-only; with `writable`, below `/work`.
    """

    data: bytes | None = None
    ref: PayloadRef | None = None
    writable: bool = False

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return len(self.data or b"") if self.ref is None else self.ref.size_bytes


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One job. Everything but `command` has a default. See `validate_spec` for the bounds.

    `start_within_ms`: dead-letter the job if no attempt has started this long after ingestion
    (0: wait for ever). `group` names a set of jobs for `ls --group` and `cancel --group`.
    `inputs`: files by name (`JobInput`). `outputs`: files below `/work` that are kept when the job
    has ended: `report.txt`, `plots/` (all below it) or `plots/*.png`.
    `image`: what the job sees as its read-only root: an image that the operator of the node has
    configured under this name; "" is the host's own root.
    `exclusive`: two attempts never run at once, not even where a node is cut off: the node ends
    the attempt when its lease runs out, and the next begins only after that (ADR 0011).
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
    image: str = ""
    priority: int = 0
    start_within_ms: int = 0
    exclusive: bool = False
    submitted_ms: int = 0
    submitter: str = ""
    payload: bytes | None = None
    payload_ref: PayloadRef | None = None
    inputs: dict[str, JobInput] = {}
    outputs: tuple[str, ...] = ()


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


LIMIT_BOUNDS: Final[dict[str, tuple[int, int]]] = {
    "wall_ms": (1, bound.WALL_MS_MAX),
    "grace_ms": (0, 600_000),
    "pids_max": (1, 100_000),
    "tmp_bytes": (1, bound.MEMORY_BYTES_MAX),
    "work_bytes": (1, bound.MEMORY_BYTES_MAX),
    "shm_bytes": (1, bound.MEMORY_BYTES_MAX),
    "swap_bytes": (0, bound.MEMORY_BYTES_MAX),
    "cpu_ms": (0, bound.WALL_MS_MAX),
    "idle_ms": (0, bound.WALL_MS_MAX),
    "io_read_bytes_per_s": (0, bound.MEMORY_BYTES_MAX),
    "io_write_bytes_per_s": (0, bound.MEMORY_BYTES_MAX),
    "open_files_max": (bound.OPEN_FILES_MIN, bound.OPEN_FILES_MAX),
    "tmp_inodes": (bound.INODES_MIN, bound.INODES_MAX),
    "work_inodes": (bound.INODES_MIN, bound.INODES_MAX),
    "output_bytes": (0, bound.OUTPUT_BYTES_MAX),
}
"""Inclusive bounds of each field of `Limits`."""
NO_LIMIT_IS_ZERO: Final = frozenset(
    {"cpu_ms", "idle_ms", "io_read_bytes_per_s", "io_write_bytes_per_s"}
)
"""Fields of `Limits` whose 0 means that there is no such limit."""


def _check_numbers(spec: JobSpec) -> None:
    _check_range("resources.cpu_millis", spec.resources.cpu_millis, 10, bound.CPU_MILLIS_MAX)
    _check_range(
        "resources.memory_bytes",
        spec.resources.memory_bytes,
        bound.MEMORY_BYTES_MIN,
        bound.MEMORY_BYTES_MAX,
    )
    _check_range("resources.gpus", spec.resources.gpus, 0, bound.GPUS_MAX)
    _check_devices(spec.resources)
    for name, (low, high) in LIMIT_BOUNDS.items():
        _check_range(f"limits.{name}", getattr(spec.limits, name), low, high)
    _check_range("retry.max_attempts", spec.retry.max_attempts, 1, bound.ATTEMPTS_MAX)
    _check_range("retry.backoff_ms", spec.retry.backoff_ms, 0, bound.WALL_MS_MAX)
    _check_range("retry.backoff_max_ms", spec.retry.backoff_max_ms, 0, bound.WALL_MS_MAX)
    _require(1.0 <= spec.retry.factor <= 100.0, "retry.factor must be between 1 and 100")
    _check_range("priority", spec.priority, -bound.PRIORITY_MAX, bound.PRIORITY_MAX)
    _check_range("start_within_ms", spec.start_within_ms, 0, bound.WALL_MS_MAX)
    _check_range("submitted_ms", spec.submitted_ms, 0, bound.EPOCH_MS_MAX)


def is_file_name(name: str) -> bool:
    """True where `name` is a path that stays below the folder it is meant for."""
    parts = name.split("/")
    return (
        0 < len(name.encode("utf-8", "surrogatepass")) <= bound.FILE_NAME_BYTES_MAX
        and len(parts) <= bound.FILE_DEPTH_MAX
        and all(part not in ("", ".", "..") for part in parts)
        and all(len(part.encode("utf-8", "surrogatepass")) <= 255 for part in parts)
        and name.isprintable()
    )


def _check_place(what: str, ref: PayloadRef) -> None:
    """Numbers as Kafka has them: a partition is an int32, an offset an int64."""
    _check_range(f"{what}.partition", ref.partition, 0, 2**31 - 1)
    _check_range(f"{what}.offset", ref.offset, 0, 2**62)


def _check_input(name: str, given: JobInput) -> None:
    what = f"input {name[:80]!r}"
    _require(is_file_name(name), f"{what} is not a relative path of printable names without '..'")
    _require(
        (given.data is None) != (given.ref is None),
        f"{what} needs either data or ref (a claim check), and not both",
    )
    _check_range(f"{what}: size in bytes", given.size_bytes, 0, bound.PAYLOAD_BYTES_MAX)
    if given.ref is not None:
        _check_place(f"{what}: ref", given.ref)
        _require(bool(given.ref.sha256), f"{what}: ref.sha256 is missing")


def _check_files(spec: JobSpec) -> None:
    _check_range("the number of inputs", len(spec.inputs), 0, bound.INPUTS_MAX)
    for name, given in spec.inputs.items():
        _check_input(name, given)
    total = sum(given.size_bytes for given in spec.inputs.values())
    most = min(bound.INPUTS_BYTES_MAX, spec.limits.work_bytes)
    _check_range("bytes of all inputs (limits.work_bytes holds them)", total, 0, most)
    _check_range("the number of outputs", len(spec.outputs), 0, bound.OUTPUTS_MAX)
    for pattern in spec.outputs:
        _require(
            is_file_name(pattern.removesuffix("/")),
            f"output {pattern[:80]!r} is not a path below /work, such as report.txt, plots/ or "
            "plots/*.png",
        )


def required_limits(spec: JobSpec) -> tuple[LimitName, ...]:
    """What a node must enforce to run this job: `isolation.require`, less what it does not use."""
    limits, unused = spec.limits, set[LimitName]()
    if network_of(spec) == "host":
        unused.add("network")
    if not limits.cpu_ms:
        unused.add("cpu_time")
    if not (limits.io_read_bytes_per_s or limits.io_write_bytes_per_s):
        unused.add("io")
    wanted = [name for name in spec.isolation.require if name not in unused]
    if spec.resources.placed_by_cpu and "cpuset" not in wanted:
        wanted.append("cpuset")
    return tuple(wanted)


def network_of(spec: JobSpec) -> Literal["none", "host"]:
    """What network the job sees."""
    return "host" if spec.isolation.profile == "network" else spec.isolation.network


def required_labels(spec: JobSpec) -> dict[str, str]:
    """Labels that a node must have: those of the job, and what its network asks for."""
    return spec.node_labels | (HOST_NETWORK_LABEL if network_of(spec) == "host" else {})


def profile_of(spec: JobSpec) -> Profile:
    """The preset that applies: GPUs need theirs."""
    return "gpu" if spec.resources.any_gpu else spec.isolation.profile


def _check_devices(asked: Resources) -> None:
    _check_range("resources.gpu_memory_bytes_min", asked.gpu_memory_bytes_min, 0,
                 bound.MEMORY_BYTES_MAX)  # fmt: skip
    _check_range("resources.gpu_share_millis", asked.gpu_share_millis, 0, 1000)
    _check_range("resources.gpu_share_memory_bytes", asked.gpu_share_memory_bytes, 0,
                 bound.MEMORY_BYTES_MAX)  # fmt: skip
    for field, text in (("gpu_model", asked.gpu_model), ("gpu_profile", asked.gpu_profile)):
        _require(
            len(text) <= bound.GPU_NAME_CHARS_MAX and text.isprintable(),
            f"resources.{field} is too long or not printable",
        )
    shared = asked.gpu_share_millis or asked.gpu_share_memory_bytes
    _require(
        not (shared and asked.gpus),
        "resources asks for whole gpus and for a gpu_share; a share is a part of one GPU, ask for "
        "one or the other",
    )
    _require(
        not asked.gpu_profile or asked.gpus > 0,
        "resources.gpu_profile without gpus; gpus says how many such MIG instances",
    )
    _require(
        not asked.gpu_profile or asked.gpu_links == "any",
        "resources.gpu_links with gpu_profile; MIG instances have no NVLinks",
    )
    _require(
        asked.cpu_pinning == "shared" or asked.cpu_millis % 1000 == 0,
        f"resources.cpu_millis is {asked.cpu_millis}; with cpu_pinning it counts whole CPUs, "
        "a multiple of 1000",
    )


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
    for field, text in (("name", spec.name), ("submitter", spec.submitter)):
        _require(
            len(text) <= bound.TEXT_CHARS_MAX,
            f"{field} has {len(text)} characters, at most {bound.TEXT_CHARS_MAX}",
        )
    _require(
        not spec.image or is_valid_name(spec.image),
        f"image {spec.image[:40]!r} is not a name; an operator gives images names of letters, "
        "digits, '.', '_', '-', at most 128 (`outrider nodes` shows them)",
    )
    _check_command(spec)
    _check_numbers(spec)
    _check_files(spec)
    _require(
        spec.isolation.profile != "gpu" or spec.resources.any_gpu,
        "isolation.profile is gpu, and resources ask for no GPU; set resources.gpus",
    )
    _require(
        spec.payload is None or spec.payload_ref is None,
        "payload and payload_ref are both set; send the bytes inline or by claim check, not both",
    )
    if spec.payload_ref is not None:
        _check_range("payload_ref.size_bytes", spec.payload_ref.size_bytes, 0,
                     bound.PAYLOAD_BYTES_MAX)  # fmt: skip
        _check_place("payload_ref", spec.payload_ref)
        _require(  # the place alone anybody can guess, and what is there may be another's
            bool(spec.payload_ref.sha256),
            "payload_ref.sha256 is missing; it is the digest of the bytes, in hex",
        )


def without_payload(spec: JobSpec, job: JobId) -> JobSpec:
    """The spec as the ledger and intents carry it: identified, its payload left in Kafka."""
    return msgspec.structs.replace(spec, id=job, payload=None, payload_ref=None)
