"""Runs every attack once in one mode, in a process of its own, and prints the results as JSON.

A process of its own, because the unprivileged mode must be tried as an ordinary user.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chaos.demo.leftovers import mount_lines
from node_agent.launcher.files import read_table
from node_agent.launcher.rootfs import DEVICE_NODES
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, Limit, LimitNotEnforced, SandboxPlan
from node_agent.sandbox.settings import (
    BACKENDS,
    Backend,
    SandboxSettings,
    interpreter,
    interpreter_paths,
)
from tests.attacks.checks import Seen
from tests.attacks.table import ATTACKS, PRELUDE, Attack

INSTANCE = f"attacks-{os.getpid()}"
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PARALLEL = 2
SLEEPERS = re.compile(rb"sleep\x00424[23]\b")


def host_state() -> dict[str, Any]:
    """What no attack may change on the host, and other programs do not change meanwhile."""
    return {
        "mounts": sorted(mount_lines(read_table("/proc/self/mountinfo"))),
        "hostname": socket.gethostname(),
        "shm": sorted(path.name for path in Path("/dev/shm").iterdir()),
        "devices": {name: owned(f"/dev/{name}") for name in DEVICE_NODES},
        "core_pattern": Path("/proc/sys/kernel/core_pattern").read_text(),
    }


def owned(path: str) -> tuple[int, int, int]:
    """Whose it is, and for whom."""
    found = Path(path).stat()
    return found.st_uid, found.st_gid, found.st_mode


def leftovers(instance: str) -> list[str]:
    """Our cgroups, and sleepers that attacks started, which must all be gone.

    Those in cgroups of other instances are another run's.
    """
    found = [str(path) for path in _walk(_CGROUP_ROOT, f"outrider-{instance}.")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                cgroups = (entry / "cgroup").read_text()
            except OSError:
                continue  # it ended meanwhile
            others = "/outrider-" in cgroups and f"/outrider-{instance}." not in cgroups
            if SLEEPERS.search(command) and not others:
                found.append(f"process {entry.name}: {command!r}")
    return found


def _walk(root: Path, prefix: str) -> Iterable[Path]:
    for folder, names, _ in os.walk(root):
        for name in names:
            if name.startswith(prefix):
                yield Path(folder) / name


def plan_of(attack: Attack, require: frozenset[Limit]) -> SandboxPlan:
    program = (
        ("/bin/sh", "-c", attack.program)
        if attack.shell
        else (interpreter(), "-I", "-c", PRELUDE + attack.program)
    )
    fields: dict[str, Any] = {
        "wall_ms": 120_000,
        "grace_ms": 50,
        "memory_bytes": 128 * MIB,
        "pids_max": 64,
        "cpu_millis": 2000,
    }
    return SandboxPlan(key=attack.id, argv=program, require=require, **(fields | attack.plan))


async def refused(sandbox: NativeSandbox, attack: Attack) -> dict[str, Any]:
    """Where a limit cannot be enforced, a plan that requires it must not run at all."""
    try:
        await sandbox.run(plan_of(attack, attack.needs), b"")
    except LimitNotEnforced as error:
        return {"held": True, "saw": str(error)}
    return {"held": False, "saw": "a plan ran without a limit that it requires"}


async def attempt(sandbox: NativeSandbox, attack: Attack) -> dict[str, Any]:
    if attack.needs - sandbox.enforcement.enforced:
        return await refused(sandbox, attack)
    chunks: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    stdin = str(os.getpid()).encode() if attack.stdin == b"HOST_PID" else attack.stdin
    outcome = await sandbox.run(
        plan_of(attack, sandbox.enforcement.enforced),
        stdin,
        lambda stream, data: chunks[stream].append(data),
    )
    stdout = b"".join(chunks["stdout"])
    text = stdout[:4000].decode("utf-8", "replace")
    held = attack.held(sandbox.settings.backend, Seen(outcome, text, len(stdout)))
    errors = b"".join(chunks["stderr"])[-600:].decode("utf-8", "replace")
    return {"held": held, "saw": f"{outcome} stdout={text[:600]!r} stderr={errors!r}"}


async def meetings(sandbox: NativeSandbox) -> dict[str, dict[str, Any]]:
    """Two jobs at once try to find each other: abstract sockets, /dev/shm, signals (30, 47)."""
    host = socket.socket(socket.AF_UNIX)
    host.bind(f"\0outrider-host-{os.getpid()}")
    host.listen()
    first = """
import socket, time
listener = socket.socket(socket.AF_UNIX); listener.bind("\\0outrider-meeting"); listener.listen()
write("/dev/shm/outrider-secret"); write("/tmp/outrider-secret")
print("ready", flush=True); time.sleep(60)
"""
    second = f"""
import socket
tried(socket.socket(socket.AF_UNIX).connect, "\\0outrider-meeting")
tried(socket.socket(socket.AF_UNIX).connect, "\\0outrider-host-{os.getpid()}")
tried(os.stat, "/dev/shm/outrider-secret"); tried(os.stat, "/tmp/outrider-secret")
"""
    ready = asyncio.Event()
    require = sandbox.enforcement.enforced
    listening = Attack(30, "first", first, lambda _: True)
    waiting = asyncio.create_task(
        sandbox.run(plan_of(listening, require), b"", lambda *_: ready.set())
    )
    waiting.add_done_callback(lambda _: ready.set())  # one that failed never says so
    await ready.wait()
    allowed = {"EPERM", "ECONNREFUSED", "ENOENT"}
    attack = Attack(30, "second", second, lambda s: len(s.words) == 4 and set(s.words) <= allowed)
    result = await attempt(sandbox, attack)
    await sandbox.kill(listening.id, "test over")
    await waiting
    host.close()
    return {"30-47-two-jobs-meet": result}


async def run_all(backend: Backend) -> dict[str, Any]:
    before = host_state()
    instance = f"{INSTANCE}-{backend}"
    settings = SandboxSettings(
        extra_ro_paths=interpreter_paths(), instance=instance, backend=backend
    )
    sandbox = await NativeSandbox.start(settings)
    gate = asyncio.Semaphore(_PARALLEL)

    async def guarded(attack: Attack) -> tuple[str, dict[str, Any]]:
        async with gate:
            return attack.id, await attempt(sandbox, attack)

    try:
        results = dict(await asyncio.gather(*(guarded(attack) for attack in ATTACKS)))
        results |= await meetings(sandbox)
    finally:
        await sandbox.close()
    after = host_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    results["host-unchanged"] = {"held": not changed, "saw": str(changed)}
    left = leftovers(instance)
    results["nothing-left"] = {"held": not left, "saw": str(left)}
    return {"mode": sandbox.enforcement.mode, "results": results}


if __name__ == "__main__":
    chosen: Backend = next(name for name in BACKENDS if name == sys.argv[1])
    json.dump(asyncio.run(run_all(chosen)), sys.stdout)
