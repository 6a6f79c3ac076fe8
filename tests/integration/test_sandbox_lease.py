"""The launcher's share of a lease: it ends the job by itself, and an agent ends a dead launcher."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest

from node_agent.launcher.kernel import boot_ms
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxOutcome, SandboxPlan
from node_agent.sandbox.settings import SandboxSettings
from tests.integration.sandboxes import started_or_skip

INSTANCE = f"lease-{os.getpid()}"


@pytest.fixture
async def sandbox() -> AsyncIterator[NativeSandbox]:
    started = await started_or_skip(SandboxSettings(instance=INSTANCE))
    yield started
    await started.close()


def plan(sandbox: NativeSandbox, lease_ms: int, script: str = "sleep 60") -> SandboxPlan:
    return SandboxPlan(
        key="a.1", argv=("/bin/sh", "-c", f"trap '' TERM; {script}"), wall_ms=60_000,
        grace_ms=50_000, memory_bytes=64 * MIB, pids_max=32,
        require=sandbox.enforcement.enforced, lease_until_ms=boot_ms() + lease_ms,
    )  # fmt: skip


async def begun(
    sandbox: NativeSandbox, job: SandboxPlan
) -> tuple[asyncio.Task[SandboxOutcome], int]:
    """The run, and when its program started (CLOCK_BOOTTIME)."""
    running = asyncio.Event()
    run = asyncio.create_task(sandbox.run(job, b"", None, running.set))
    await running.wait()
    return run, boot_ms()


async def test_a_job_dies_without_grace_when_its_lease_is_over(sandbox: NativeSandbox) -> None:
    job = plan(sandbox, 3_000)
    outcome = await sandbox.run(job, b"")
    assert outcome.cause == "lease_over" and "lease ran out" in outcome.detail
    assert boot_ms() >= job.lease_until_ms


async def test_an_extended_lease_lasts_longer_and_a_late_one_changes_nothing(
    sandbox: NativeSandbox,
) -> None:
    job = plan(sandbox, 4_000, "sleep 5; exit 3")
    run, _ = await begun(sandbox, job)
    await sandbox.extend_lease(job.key, boot_ms() + 60_000)
    await sandbox.extend_lease(job.key, boot_ms() + 1)  # an older one, overtaken
    outcome = await run
    assert (outcome.cause, outcome.exit_code) == ("exited", 3)


async def test_nothing_is_launched_upon_a_lease_that_is_over(sandbox: NativeSandbox) -> None:
    outcome = await sandbox.run(plan(sandbox, -1, "exit 0"), b"")
    assert outcome.cause == "sandbox_failed" and "lease ran out" in outcome.detail


async def test_a_launcher_that_does_not_answer_is_killed_with_its_jobs(
    sandbox: NativeSandbox,
) -> None:
    job = plan(sandbox, 60_000, "exec sleep 60.25")
    run, _ = await begun(sandbox, job)
    os.kill(sandbox.launcher_pid, signal.SIGSTOP)
    before = time.monotonic()
    await sandbox.fence(job.key, "lease ran out")
    outcome = await run
    assert outcome.cause == "sandbox_failed" and not sandbox.alive
    assert time.monotonic() - before >= 0.5, "it was given its time to answer"
