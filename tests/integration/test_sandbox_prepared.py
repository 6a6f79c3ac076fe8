"""Sandboxes made ahead on this machine: used by one job each, replaced, and gone in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxPlan, SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings
from tests.attacks.runner import leftovers
from tests.integration.sandboxes import inits

INSTANCE = f"prepared-{os.getpid()}"
PREPARED = 3
WAIT_S = 120.0


async def started(**fields: Any) -> NativeSandbox:
    try:
        return await NativeSandbox.start(
            SandboxSettings(instance=INSTANCE, **({"prepared": PREPARED} | fields))
        )
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


def plan(sandbox: NativeSandbox, key: str, script: str, **fields: Any) -> SandboxPlan:
    defaults: dict[str, Any] = {
        "argv": ("/bin/sh", "-c", script),
        "require": sandbox.enforcement.enforced,
        "memory_bytes": 64 * MIB,
        "pids_max": 32,
    }
    return SandboxPlan(key=key, **(defaults | fields))


async def until_waiting(sandbox: NativeSandbox, count: int) -> list[int]:
    """So many, and the same a moment later: the init of a job may outlive its end a little."""
    deadline, before = time.monotonic() + WAIT_S, [-1]
    while len(found := inits(sandbox)) != count or found != before:
        assert time.monotonic() < deadline, f"{len(found)} wait, not {count}"
        before = found
        await asyncio.sleep(0.05)
    return found


async def test_each_serves_one_job_with_the_jobs_own_limits() -> None:
    sandbox = await started()
    for number in range(2):
        assert (await sandbox.run(plan(sandbox, f"first-{number}", "true"), b"")).exit_code == 0
    ahead = set(await until_waiting(sandbox, PREPARED))
    seen: list[bytes] = []
    script = "echo left > /tmp/x; ls /tmp /work | tr '\\n' ' '; ulimit -n; cat"
    for number in range(8):
        files = 100 + number
        wanted = plan(sandbox, f"a-{number}", script, open_files_max=files, pids_max=20 + number)
        outcome = await sandbox.run(wanted, b"in", lambda _, data: seen.append(data))
        assert outcome.exit_code == 0
        text = b"".join(seen).decode()
        assert text == f"/tmp: x  /work: {files}\nin", text
        seen.clear()
    left = set(await until_waiting(sandbox, PREPARED))
    assert not ahead & left, "one was used twice"
    await sandbox.close()
    assert leftovers(INSTANCE) == []


async def test_memory_of_a_prepared_one_is_the_jobs(tmp_path: Path) -> None:
    sandbox = await started()
    for number in range(2):
        await sandbox.run(plan(sandbox, f"first-{number}", "true"), b"")
    await until_waiting(sandbox, PREPARED)
    large = plan(sandbox, "large", "head -c 32m /dev/zero | tail -c 30m | wc -c")
    outcome = await sandbox.run(large, b"")
    assert (outcome.cause, outcome.exit_code) == ("exited", 0)
    await sandbox.close()


async def test_a_shape_of_its_own_runs_beside_them() -> None:
    sandbox = await started()
    for number in range(2):
        await sandbox.run(plan(sandbox, f"first-{number}", "true"), b"")
    await until_waiting(sandbox, PREPARED)
    seen: list[bytes] = []
    other = plan(sandbox, "other", "hostname", hostname="elsewhere")
    assert (await sandbox.run(other, b"", lambda _, data: seen.append(data))).exit_code == 0
    assert b"".join(seen) == b"elsewhere\n"
    await until_waiting(sandbox, PREPARED)
    await sandbox.close()
    assert leftovers(INSTANCE) == []


async def test_jobs_back_to_back_find_room_though_the_last_ones_init_is_leaving() -> None:
    sandbox = await started(jobs_max=1, prepared=0)
    for number in range(60):
        outcome = await sandbox.run(plan(sandbox, f"next-{number}", "exit 4"), b"")
        assert (outcome.cause, outcome.exit_code) == ("exited", 4)
    await sandbox.close()
    assert leftovers(INSTANCE) == []


async def test_killed_ones_cost_no_job() -> None:
    sandbox = await started()
    for number in range(2):
        await sandbox.run(plan(sandbox, f"first-{number}", "true"), b"")
    await until_waiting(sandbox, PREPARED)
    deadline = time.monotonic() + WAIT_S
    while found := inits(sandbox):  # one may still be on its way, or end by itself
        assert time.monotonic() < deadline, found
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
    assert (await sandbox.run(plan(sandbox, "next", "exit 3"), b"")).exit_code == 3
    await sandbox.close()
    assert leftovers(INSTANCE) == []
