"""No child of the OCI launcher stays a zombie, whoever dies when (ADR 0009).

A dead process that nobody waits for keeps its pid namespace, and so the job's end, for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxOutcome, SandboxPlan
from node_agent.sandbox.settings import Backend, SandboxSettings
from tests.attacks.modes import REPO, require_runtime
from tests.attacks.runner import leftovers
from tests.patience import patient

INSTANCE = f"children-{os.getpid()}"
pytestmark = pytest.mark.root
END_S = float(patient(60))
"""A deadline against hangs, not a measure."""
TURNS = 40
AT_ONCE = 4
START_S_MAX = patient(250) / 1000
"""Kills come within this of a start: a runtime needs about half of it."""


class Child(NamedTuple):
    """A process, as /proc shows it."""

    pid: int
    name: str
    state: str


def children(parent: int) -> list[Child]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            left, _, right = path.read_text().rpartition(")")
            pid, _, name = left.partition(" (")
            state, parent_of = right.split()[:2]
            if int(parent_of) == parent:
                found.append(Child(int(pid), name, state))
    return found


def sleeper(sandbox: NativeSandbox, key: str, grace_ms: int = 0) -> SandboxPlan:
    return SandboxPlan(
        key=key, argv=("/bin/sh", "-c", "sleep 4242 & sleep 4242"), wall_ms=120_000,
        grace_ms=grace_ms, memory_bytes=64 * MIB, pids_max=32,
        require=sandbox.enforcement.enforced,
    )  # fmt: skip


async def no_zombies(sandbox: NativeSandbox) -> None:
    """Those that are there now are soon gone, without any event that somebody waits for."""
    deadline = time.monotonic() + END_S
    while zombies := [child for child in children(sandbox.launcher_pid) if child.state == "Z"]:
        assert time.monotonic() < deadline, zombies
        await asyncio.sleep(0.02)


_PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from node_agent.launcher import kernel
from node_agent.oci.children import Children
kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
children = Children()
def child(code):
    pid = os.fork()
    if pid == 0: os._exit(code)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid
def left(): return len(open("/proc/thread-self/children").read().split())
def starter(pid_file, code):
    # as crun: what it starts is ours, and dead, before it writes the number down
    told, ready, go = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        middle = os.fork()
        if middle == 0:
            os.write(told[1], b"%d" % child(5))
            os._exit(0)
        os.waitpid(middle, 0)
        os.write(ready[1], b"!")
        os.read(go[0], 1)
        with open(pid_file, "wb") as file: file.write(os.read(told[0], 20))
        os._exit(code)
    children.know_starter(pid, pid_file)
    os.read(ready[0], 1)
    children.reap_strangers()
    os.write(go[1], b"!")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    children.reap_strangers()
    return pid
known, stranger = children.know(child(3)), child(4)
children.reap_strangers()
print("stranger gone", left() == 1, "status kept", children.wait(known)[0] >> 8, end="; ")
good = starter(sys.argv[2], 0)
print("starter", children.wait_starter(good), end=" ")
container, fd = children.started(good)
children.reap_strangers()
print("container", children.wait(container)[0] >> 8, end="; ")
bad = starter(sys.argv[2], 6)
print("starter", children.wait_starter(bad), end=" ")
children.failed(bad)
print("left", left(), end="; ")
if os.fork() == 0:
    os.fork()
    time.sleep(600)
children.end_all()
print("left", left())
"""


def test_strangers_are_reaped_and_nobodys_status_is_taken(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(REPO), str(tmp_path / "pid")],
        capture_output=True, text=True, timeout=END_S, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == (
        "stranger gone True status kept 3; starter 0 container 5; starter 6 left 0; left 0"
    ), done.stderr


_LEAVES_A_STRANGER = """#!{python} -IS
# {real}, which leaves a process in the job's pid namespace to whoever started it.
import os, sys, time
sys.path.insert(0, {repo!r})
from node_agent.launcher import kernel
if "run" in sys.argv:
    import json
    bundle = sys.argv[sys.argv.index("--bundle") + 1]
    with open(bundle + "/config.json") as file:
        spaces = json.load(file)["linux"]["namespaces"]
    path = next(space["path"] for space in spaces if space["type"] == "pid")
    middle = os.fork()
    if middle == 0:
        kernel.setns(os.open(path, os.O_RDONLY), kernel.CLONE_NEWPID)
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        os._exit(0)
    os.waitpid(middle, 0)
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


@pytest.mark.parametrize("backend", ["crun", "runc"])
async def test_a_stranger_in_the_pid_namespace_does_not_keep_the_job(
    backend: Backend, tmp_path: Path
) -> None:
    """The known fault of old: the job's end, and the launcher's, waited for it for ever."""
    require_runtime(backend)
    real = shutil.which(backend)
    runtime = tmp_path / backend
    runtime.write_text(_LEAVES_A_STRANGER.format(python=sys.executable, real=real, repo=str(REPO)))
    runtime.chmod(0o755)
    chosen = SandboxSettings(
        instance=f"{INSTANCE}-{backend}", backend=backend, runtime_path=str(runtime)
    )
    async with asyncio.timeout(END_S):
        sandbox = await NativeSandbox.start(chosen)
        for number in range(3):
            plan = SandboxPlan(
                key=f"k{number}", argv=("/bin/sh", "-c", "exit 7"), wall_ms=30_000,
                memory_bytes=64 * MIB, require=sandbox.enforcement.enforced,
            )  # fmt: skip
            ended = await sandbox.run(plan, b"")
            assert (ended.cause, ended.exit_code) == ("exited", 7)
        await no_zombies(sandbox)
        await sandbox.close()
    assert not sandbox.alive and leftovers(chosen.instance) == []


@pytest.mark.parametrize("backend", ["crun", "runc", "runsc"])
async def test_the_status_of_a_job_shorter_than_its_runtime_is_kept(backend: Backend) -> None:
    """It is dead, and ours, before the runtime says which process it was."""
    require_runtime(backend)
    chosen = SandboxSettings(instance=f"{INSTANCE}-{backend}", backend=backend)
    sandbox = await NativeSandbox.start(chosen)

    async def short(number: int) -> None:
        plan = SandboxPlan(
            key=f"k{number}", argv=("/bin/sh", "-c", f"exit {number}"), wall_ms=120_000,
            memory_bytes=64 * MIB, require=sandbox.enforcement.enforced,
        )  # fmt: skip
        ended = await sandbox.run(plan, b"")
        assert (ended.cause, ended.exit_code) == ("exited", number), ended

    try:
        for turn in range(0, TURNS, AT_ONCE):
            await asyncio.gather(*(short(1 + turn + place) for place in range(AT_ONCE)))
    finally:
        await sandbox.close()


async def disturbed(sandbox: NativeSandbox, key: str, how: str, delay_s: float) -> SandboxOutcome:
    """A job that is ended in one way, `delay_s` after its start."""
    running = asyncio.create_task(sandbox.run(sleeper(sandbox, key), b""))
    await asyncio.sleep(delay_s)
    if how == "runtime killed":
        for child in children(sandbox.launcher_pid):
            if child.name.startswith(("crun", "runc", "runsc", "exe")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
    while not running.done():
        await sandbox.kill(key, "test")
        await asyncio.wait([running], timeout=1.0)
    return running.result()


@pytest.mark.parametrize("backend", ["crun", "runc", "runsc"])
async def test_whenever_a_start_is_broken_off_everything_is_reaped(backend: Backend) -> None:
    """Jobs killed, and runtimes too, at any stage of a start; in the end the launcher amid four."""
    require_runtime(backend)
    dice = random.Random(9)
    causes = {"killed", "sandbox_failed", "signalled"}  # the container is named as its runtime is
    chosen = SandboxSettings(instance=f"{INSTANCE}-{backend}", backend=backend)
    async with asyncio.timeout(2 * END_S):
        sandbox = await NativeSandbox.start(chosen)
        for turn in range(0, TURNS, AT_ONCE):
            ended = await asyncio.gather(
                *(
                    disturbed(
                        sandbox, f"k{turn + place}", ("job killed", "runtime killed")[place == 0],
                        dice.random() * START_S_MAX,
                    )
                    for place in range(AT_ONCE)
                )
            )  # fmt: skip
            assert {one.cause for one in ended} <= causes, ended
        await no_zombies(sandbox)
        last = [asyncio.create_task(sandbox.run(sleeper(sandbox, f"z{n}"), b"")) for n in range(4)]
        await asyncio.sleep(dice.random() * START_S_MAX)
        await sandbox.close()
        await asyncio.gather(*last)
    assert not sandbox.alive and leftovers(chosen.instance) == []
