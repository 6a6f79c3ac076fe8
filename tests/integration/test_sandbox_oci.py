"""Jobs by a container runtime, end to end: outcomes, files, an agent that goes away, clean-up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxPlan
from node_agent.sandbox.settings import Backend, SandboxSettings
from tests.attacks.modes import require_runtime
from tests.attacks.runner import leftovers, owned

INSTANCE = f"oci-{os.getpid()}"
pytestmark = pytest.mark.root


def settings(backend: Backend) -> SandboxSettings:
    require_runtime(backend)
    return SandboxSettings(instance=f"{INSTANCE}-{backend}", backend=backend)


@pytest.fixture(params=["crun", "runc", "runsc"])
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[NativeSandbox]:
    started = await NativeSandbox.start(settings(request.param))
    yield started
    await started.close()
    assert leftovers(started.settings.instance) == []


def job(sandbox: NativeSandbox, script: str, **fields: Any) -> SandboxPlan:
    defaults: dict[str, Any] = {
        "key": "a", "argv": ("/bin/sh", "-c", script), "require": sandbox.enforcement.enforced,
        "wall_ms": 60_000, "grace_ms": 200, "memory_bytes": 64 * MIB, "pids_max": 32,
    }  # fmt: skip
    return SandboxPlan(**(defaults | fields))


async def test_outcomes_are_those_of_the_native_sandbox(sandbox: NativeSandbox) -> None:
    output: list[bytes] = []
    script = "cat; printf done > $OUTRIDER_RESULT; exit 7"
    done = await sandbox.run(job(sandbox, script), b"in", lambda _, data: output.append(data))
    assert (done.cause, done.exit_code, done.result) == ("exited", 7, b"done")
    assert output == [b"in"]
    killed = await sandbox.run(job(sandbox, "kill -SEGV $$"), b"")
    assert (killed.cause, killed.signal) == ("signalled", signal.SIGSEGV)
    for argv, code in ((("no-such-program",), 127), (("/etc/passwd",), 126)):
        wrong = await sandbox.run(job(sandbox, "", argv=argv), b"")
        assert (wrong.cause, wrong.exit_code) == ("exited", code), wrong
        assert wrong.detail


@pytest.mark.parametrize("backend", ["crun", "runc", "runsc"])
async def test_no_runtime_makes_the_hosts_null_device_somebodys(backend: Backend) -> None:
    """runsc gives its standard streams to the user that it runs as, whatever they are."""
    chosen, before = settings(backend), owned("/dev/null")
    started = await NativeSandbox.start(chosen)
    assert (await started.run(job(started, "exit 3"), b"")).exit_code == 3
    await started.close()
    assert owned("/dev/null") == before


async def test_sigterm_reaches_a_job_that_handles_nothing(sandbox: NativeSandbox) -> None:
    """As pid 1 it would not: the kernel ignores signals without a handler there."""
    late = await sandbox.run(job(sandbox, "exec sleep 60", wall_ms=3000, grace_ms=30_000), b"")
    assert (late.cause, late.signal) == ("timed_out", signal.SIGTERM)


async def test_the_next_agent_goes_on_with_the_containers(tmp_path: Path) -> None:
    chosen = settings("crun")
    first = await NativeSandbox.start(chosen, tmp_path)
    plan = job(first, "echo begun; sleep 3; echo over; exit 4")
    began = asyncio.Event()
    running = asyncio.create_task(first.run(plan, b"", lambda *_: began.set(), keep=True))
    await began.wait()
    first.detach()
    with pytest.raises(asyncio.CancelledError):
        await running
    second = await NativeSandbox.adopt(chosen, tmp_path)
    assert second is not None and second.found == {"a"}
    rest: list[bytes] = []
    ended = await second.resume(plan, {"stdout": 6}, lambda _, data: rest.append(data))
    assert (ended.cause, ended.exit_code, rest) == ("exited", 4, [b"over\n"])
    await second.close()
    assert leftovers(chosen.instance) == []


async def test_a_launcher_of_another_backend_is_not_adopted(tmp_path: Path) -> None:
    chosen = settings("crun")
    first = await NativeSandbox.start(SandboxSettings(instance=chosen.instance), tmp_path)
    plan = job(first, "echo begun; sleep 60")
    began = asyncio.Event()
    running = asyncio.create_task(first.run(plan, b"", lambda *_: began.set()))
    await began.wait()
    first.detach()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await NativeSandbox.adopt(chosen, tmp_path) is None
    second = await NativeSandbox.start(chosen, tmp_path)  # which sweeps what was killed
    await second.close()
    assert leftovers(chosen.instance) == []
