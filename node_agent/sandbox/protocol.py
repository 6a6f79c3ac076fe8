"""What agent and launcher say to each other, as the agent sees it, and what the answers mean."""

from __future__ import annotations

import os
import platform
from typing import Any, Literal

import msgspec

from idl.records import MemoryEvents, Pressure
from node_agent.sandbox.plan import Enforcement, Limit, SandboxPlan

_ENV_DEFAULTS = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/work",
    "TMPDIR": "/tmp",  # the job's own tmpfs
    "LANG": "C.UTF-8",
}
RESULT_PATH = "/work/result"
_CGROUP_ADVICE = (
    " (run as root, or under a systemd unit with Delegate=yes and DelegateSubgroup=agent)"
)


class Hello(msgspec.Struct, frozen=True):
    """The launcher's first message: what it could set up, and what its self-test found."""

    mode: Literal["root", "userns"]
    cgroup: Literal["v2", "hybrid", "v1", "none"]
    holds: list[str]
    cgroup_problems: list[str]
    probe_cause: str
    probe_detail: str
    loose: int
    loose_bits: dict[str, int]
    landlock_abi: int
    device_filter: Literal["ebpf", "v1", "none"]
    notes: list[str]
    protocol: int = 0
    build: str = ""  # of the code and settings it was started with (`native.build_of`)
    io_problem: str = ""
    backend: str = "native"
    image_paths: list[str] = []


class Message(msgspec.Struct, frozen=True):
    """Any later message of the launcher. ``fds`` names the descriptors beside it, in order."""

    op: str
    key: str = ""
    started: bool = False
    cause: str = ""
    exit_code: int | None = None
    signal: int | None = None
    detail: str = ""
    wall_ms: int = 0
    cpu_ms: int = 0
    memory_peak_bytes: int = 0
    pids_peak: int | None = None
    cpu_user_ms: int | None = None
    cpu_system_ms: int | None = None
    throttled_ms: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pressure: Pressure | None = None
    memory_events: MemoryEvents | None = None
    result_refused: str = ""
    fds: tuple[str, ...] = ()


def enforcement(hello: Hello) -> Enforcement:
    """What is held, from what the launcher set up and its self-test confirmed."""
    missing: dict[Limit, str] = {}
    no_cgroup = "; ".join(hello.cgroup_problems) or "no such cgroup controller here"
    no_cgroup += _CGROUP_ADVICE
    for limit in (Limit.MEMORY, Limit.CPU, Limit.IO):
        if limit.value not in hello.holds:
            missing[limit] = no_cgroup
    if Limit.IO not in missing and hello.io_problem:
        missing[Limit.IO] = hello.io_problem
    if "cpu_time" not in hello.holds:
        missing[Limit.CPU_TIME] = f"each process alone (RLIMIT_CPU), not the job: {no_cgroup}"
    if "cpuset" not in hello.holds:
        missing[Limit.CPUSET] = f"a job may leave the CPUs it is put on: {no_cgroup}"
    for name, bit in hello.loose_bits.items():
        if hello.loose & bit:
            missing[Limit(name)] = f"the self-test found it not held {hello.probe_detail}".strip()
    if Limit.PIDS in missing and "pids" not in hello.holds:
        missing[Limit.PIDS] = f"RLIMIT_NPROC does not hold in a user namespace, and {no_cgroup}"
    return Enforcement(
        enforced=frozenset(Limit) - frozenset(missing),
        missing=missing,
        mode=hello.mode,
        cgroup=hello.cgroup,
        kernel=platform.release(),
        landlock_abi=hello.landlock_abi,
        seccomp=Limit.SECCOMP not in missing,
        device_filter=hello.device_filter,
        notes=tuple(hello.notes),
        backend=hello.backend,
        image_paths=tuple(hello.image_paths),
    )


def unavailable_text(answer: dict[str, Any], last_words: str) -> str:
    """Why no sandbox started, and what to do about it."""
    if answer.get("op") == "died":
        return f"the launcher ended while starting: {last_words or 'run it by hand to see why'}"
    text = f"sandbox set-up failed at step {answer.get('step')!r}: {answer.get('detail')}"
    if answer.get("step") == "user namespace":
        text += (
            " (run as root, or allow user namespaces: sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
        )
    return text


def plan_message(plan: SandboxPlan) -> dict[str, Any]:
    """A plan as the launcher is told it."""
    message: dict[str, Any] = msgspec.to_builtins(plan)
    message["env"] = {**_ENV_DEFAULTS, **plan.env, "OUTRIDER_RESULT": RESULT_PATH}
    del message["require"]
    return message


def read_result(fd: int) -> bytes:
    """The launcher has checked that it is a regular file within the cap and nobody writes it.

    Read by position: whoever is told of this end again gets the same open file.
    """
    parts = []
    at, size = 0, os.fstat(fd).st_size
    while at < size and (data := os.pread(fd, size - at, at)):
        parts.append(data)
        at += len(data)
    return b"".join(parts)
