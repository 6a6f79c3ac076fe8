"""The sandbox's contract: what to run, under which limits, and what came of it.

Pure records. The native backend carries out a plan today, an OCI runtime may tomorrow; neither
may run a job whose plan requires a limit that it cannot hold.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from idl.jobs import Profile, is_file_name
from idl.records import MemoryEvents, OutputFile, Pressure

KIB = 1024
MIB = 1024 * KIB

# One job message must fit the socket buffer an ordinary user gets (net.core.wmem_max, 208 KiB on
# stock kernels); JSON escapes at most double the common case. Bulk data goes through stdin.
COMMAND_BYTES_MAX = 96 * KIB
# The kernel rejects CPU quotas under 1 ms per 100 ms period (cgroup-v2: cpu.max).
CPU_MILLIS_MIN = 10
# Room for the init process and the job's first pages.
MEMORY_BYTES_MIN = 8 * MIB
# A job that ignores SIGTERM may hold its resources no longer than this after being told to stop.
GRACE_MS_MAX = 600_000


class Limit(StrEnum):
    """A limit the sandbox can hold; a plan may require any of them."""

    MEMORY = "memory"
    PIDS = "pids"
    CPU = "cpu"
    NETWORK = "network"
    FILESYSTEM = "filesystem"
    SECCOMP = "seccomp"
    DISK = "disk"
    WALL_TIME = "wall_time"
    CPU_TIME = "cpu_time"
    IO = "io"
    CPUSET = "cpuset"


class PlacedInput(msgspec.Struct, frozen=True, kw_only=True):
    """One file to be there at the start: `path` below /work. Its bytes come beside the plan."""

    path: str
    size_bytes: int
    writable: bool = False


class SandboxPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt: command, limits, and which of the limits the job must not run without.

    0 and () mean "no such limit", but for ``swap_bytes``, where 0 is no swap. ``cpu_ms`` is of the
    whole job. ``idle_ms``: with next to no CPU time and no output. ``io_*``: for each disk behind
    the visible file systems. ``cpus`` and ``mems``: the CPUs and NUMA memory nodes it is bound to.
    ``outputs``: files below /work to collect (``node_agent.sandbox.outputs``). ``lease_until_ms``:
    CLOCK_BOOTTIME at which the job is killed unless its lease is extended (ADR 0011). ``image``:
    host directory that is its read-only root; "" for the host's own (ADR 0013).
    """

    key: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = "/work"
    hostname: str = "job"
    memory_bytes: int = 256 * MIB
    cpu_millis: int = 1000
    pids_max: int = 128
    open_files_max: int = 1024
    tmp_bytes: int = 64 * MIB
    shm_bytes: int = 64 * MIB
    work_bytes: int = 256 * MIB
    tmp_inodes: int = 16_384
    work_inodes: int = 16_384
    cpu_ms: int = 0
    idle_ms: int = 0
    swap_bytes: int = 0
    io_read_bytes_per_s: int = 0
    io_write_bytes_per_s: int = 0
    cpus: tuple[int, ...] = ()
    mems: tuple[int, ...] = ()
    inputs: tuple[PlacedInput, ...] = ()
    outputs: tuple[str, ...] = ()
    profile: Profile = "strict"
    network: Literal["none", "host"] = "none"
    wall_ms: int = 60_000
    grace_ms: int = 500
    stdout_bytes_max: int = 1 * MIB
    stderr_bytes_max: int = 1 * MIB
    result_bytes_max: int = 1 * MIB
    require: frozenset[Limit] = frozenset(Limit)
    devices: tuple[str, ...] = ()
    image: str = ""
    lease_until_ms: int = 0


Cause = Literal[
    "exited", "signalled", "timed_out", "out_of_memory", "killed", "sandbox_failed", "lease_over"
]


class SandboxOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one attempt ended. ``sandbox_failed`` is the platform's fault, never the job's.

    ``exit_code`` 127 and 126 with a ``detail`` mean that the command was not found or could not be
    executed (the shell's convention): the job's own fault.
    """

    cause: Cause
    exit_code: int | None = None
    signal: int | None = None
    detail: str = ""
    wall_ms: int = 0
    cpu_ms: int = 0
    memory_peak_bytes: int = 0
    pids_peak: int | None = None
    result: bytes | None = None
    result_refused: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    output_truncated: bool = False
    cpu_user_ms: int | None = None
    cpu_system_ms: int | None = None
    throttled_ms: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pressure: Pressure | None = None
    memory_events: MemoryEvents | None = None
    outputs: tuple[OutputFile, ...] = ()
    outputs_missing: dict[str, str] = {}


class Enforcement(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine and this user let the sandbox hold, and why not the rest."""

    enforced: frozenset[Limit]
    missing: dict[Limit, str]
    mode: Literal["root", "userns"]
    cgroup: Literal["v2", "hybrid", "v1", "none"]
    kernel: str
    landlock_abi: int
    seccomp: bool
    device_filter: Literal["ebpf", "v1", "none"] = "none"
    notes: tuple[str, ...] = ()
    backend: str = "native"
    image_paths: tuple[str, ...] = ()

    def has_image(self, image: str) -> bool:
        """True for "", the host's root, and where the launcher took hold of the image's path."""
        return not image or any(f"{image}/".startswith(f"{path}/") for path in self.image_paths)


class SandboxError(Exception):
    """Root of what the sandbox raises instead of running a job."""


class PlanRefused(SandboxError):  # noqa: N818 - reads as what happened, as events do
    """The plan itself is wrong; the message names the field and the bound."""


class CommandRefused(PlanRefused):
    """What the job asks for has no place in any plan: its own fault, on every node."""


class SandboxUnavailable(SandboxError):  # noqa: N818 - reads as what happened, as events do
    """No job can be sandboxed on this machine now; the message says what to do about it."""


class LimitNotEnforced(SandboxError):  # noqa: N818 - reads as what happened, as events do
    """The plan requires limits that this machine or user cannot hold."""

    def __init__(self, limits: dict[Limit, str]) -> None:
        self.limits = limits
        reasons = "; ".join(f"{limit.value}: {reason}" for limit, reason in limits.items())
        super().__init__(f"refused, the plan requires limits not enforced here ({reasons})")


def unheld(plan: SandboxPlan, missing: dict[Limit, str]) -> dict[Limit, str]:
    """Limits that the plan requires and sets, but that are ``missing`` here, with the reasons."""
    unused = {
        Limit.CPU_TIME: not plan.cpu_ms,
        Limit.IO: not (plan.io_read_bytes_per_s or plan.io_write_bytes_per_s),
        Limit.CPUSET: not (plan.cpus or plan.mems),
    }
    return {
        limit: missing[limit]
        for limit in sorted(plan.require)
        if limit in missing and not unused.get(limit, False)
    }


def plan_problem(plan: SandboxPlan) -> str | None:
    """What is wrong with ``plan``, or None. Checked before anything is started."""
    positive = {
        "wall_ms": plan.wall_ms,
        "open_files_max": plan.open_files_max,
        "tmp_bytes": plan.tmp_bytes,
        "shm_bytes": plan.shm_bytes,
        "work_bytes": plan.work_bytes,
        "tmp_inodes": plan.tmp_inodes,
        "work_inodes": plan.work_inodes,
        "pids_max": plan.pids_max,
    }
    for name, value in positive.items():
        if value < 1:
            return f"{name} must be at least 1, got {value}"
    optional = {
        "cpu_ms": plan.cpu_ms,
        "idle_ms": plan.idle_ms,
        "swap_bytes": plan.swap_bytes,
        "io_read_bytes_per_s": plan.io_read_bytes_per_s,
        "io_write_bytes_per_s": plan.io_write_bytes_per_s,
        "every CPU and memory node": min((*plan.cpus, *plan.mems), default=0),
    }
    for name, value in optional.items():
        if value < 0:
            return f"{name} must not be negative, got {value}"
    if not plan.key or not plan.argv or not plan.argv[0]:
        return "key and argv[0] must not be empty"
    if plan.memory_bytes < MEMORY_BYTES_MIN:
        return f"memory_bytes must be at least {MEMORY_BYTES_MIN}, got {plan.memory_bytes}"
    if plan.cpu_millis < CPU_MILLIS_MIN:
        return f"cpu_millis must be at least {CPU_MILLIS_MIN}, got {plan.cpu_millis}"
    if not 0 <= plan.grace_ms <= GRACE_MS_MAX:
        return f"grace_ms must be in 0..{GRACE_MS_MAX}, got {plan.grace_ms}"
    return _wiring_problem(plan) or _strings_problem(plan)


def _wiring_problem(plan: SandboxPlan) -> str | None:
    if min(plan.stdout_bytes_max, plan.stderr_bytes_max, plan.result_bytes_max) < 0:
        return "output caps must not be negative"
    if plan.image and (not plan.image.startswith("/") or ".." in plan.image.split("/")):
        return f"image must be an absolute path without '..', got {plan.image!r}"
    if not plan.cwd.startswith("/"):
        return f"cwd must be absolute, got {plan.cwd!r}"
    if plan.network == "host" and Limit.NETWORK in plan.require:
        return "network='host' contradicts require={network}"
    paths = [given.path for given in plan.inputs]
    if len(set(paths)) < len(paths) or not all(map(is_file_name, paths)):
        return "inputs must have different relative paths"
    if not all(is_file_name(pattern.removesuffix("/")) for pattern in plan.outputs):
        return "outputs must be relative paths"
    return None


def _strings_problem(plan: SandboxPlan) -> str | None:
    strings = [*plan.argv, *plan.env, *plan.env.values(), plan.cwd, plan.hostname, *plan.devices]
    strings.append(plan.image)
    strings += [given.path for given in plan.inputs]
    if any("\0" in text for text in strings):
        return "argv, env, cwd, hostname and devices must not contain NUL"
    if any(not name or "=" in name for name in plan.env):
        return "env names must not be empty or contain '='"
    if not 1 <= len(plan.hostname.encode()) <= 64:
        return "hostname must have 1..64 bytes"
    size = sum(len(text.encode("utf-8", "surrogateescape")) + 1 for text in strings)
    if size > COMMAND_BYTES_MAX:
        return f"argv and env have {size} bytes, at most {COMMAND_BYTES_MAX}: use stdin"
    return None
