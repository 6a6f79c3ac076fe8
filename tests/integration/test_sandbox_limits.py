"""Limits on CPU time, idleness, disks, CPUs and memory nodes, tried by jobs that exceed them."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, Limit, SandboxOutcome, SandboxPlan
from node_agent.sandbox.settings import SandboxSettings, interpreter, interpreter_paths
from tests.attacks.runner import leftovers
from tests.integration.sandboxes import started_or_skip
from tests.patience import patient

INSTANCE = f"limits-{os.getpid()}"


@pytest.fixture
async def sandbox() -> AsyncIterator[NativeSandbox]:
    settings = SandboxSettings(instance=INSTANCE, extra_ro_paths=interpreter_paths())
    started = await started_or_skip(settings)
    yield started
    await started.close()
    assert leftovers(INSTANCE) == []


async def run(sandbox: NativeSandbox, script: str, **fields: Any) -> tuple[SandboxOutcome, str]:
    """Outcome and standard output of a shell script, or of a Python program (`python=True`)."""
    python = fields.pop("python", False)
    argv = (interpreter(), "-I", "-c", script) if python else ("/bin/sh", "-c", script)
    defaults: dict[str, Any] = {
        "argv": argv,
        "require": sandbox.enforcement.enforced,
        "wall_ms": 60_000,
        "grace_ms": 50,
        "memory_bytes": 96 * MIB,
        "pids_max": 32,
    }
    output: list[bytes] = []
    plan = SandboxPlan(key="a", **(defaults | fields))
    outcome = await sandbox.run(plan, b"", lambda _, data: output.append(data))
    return outcome, b"".join(output).decode()


def held(sandbox: NativeSandbox, limit: Limit) -> None:
    if limit in sandbox.enforcement.missing:
        pytest.skip(sandbox.enforcement.missing[limit])


async def test_cpu_time_of_all_processes_together_ends_a_job(sandbox: NativeSandbox) -> None:
    """Four hogs that ignore SIGXCPU; none of them uses the whole of it alone."""
    held(sandbox, Limit.CPU_TIME)
    hogs = "trap '' XCPU; for n in 1 2 3 4; do (while :; do :; done) & done; wait"
    outcome, _ = await run(sandbox, hogs, cpu_ms=300, cpu_millis=2000)
    assert (outcome.cause, outcome.detail) == (
        "timed_out", "cpu: used more than 300 ms of CPU time",
    )  # fmt: skip
    assert 300 <= outcome.cpu_ms < outcome.wall_ms * (os.cpu_count() or 1)


async def test_one_hog_is_ended_with_or_without_cgroups(sandbox: NativeSandbox) -> None:
    hog = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    outcome, _ = await run(sandbox, hog, python=True, cpu_ms=300)
    assert (outcome.cause, outcome.detail[:4]) == ("timed_out", "cpu:")


async def test_children_that_are_short_lived_count(sandbox: NativeSandbox) -> None:
    held(sandbox, Limit.CPU_TIME)
    outcome, _ = await run(sandbox, "while :; do /bin/true; done", cpu_ms=200)
    assert (outcome.cause, outcome.detail[:4]) == ("timed_out", "cpu:")


async def test_a_job_within_its_cpu_time_ends_by_itself(sandbox: NativeSandbox) -> None:
    outcome, _ = await run(sandbox, "exit 3", cpu_ms=60_000, idle_ms=60_000)
    assert (outcome.cause, outcome.exit_code) == ("exited", 3)


async def test_an_idle_job_is_ended_and_a_talking_one_is_not(sandbox: NativeSandbox) -> None:
    idle, _ = await run(sandbox, "echo once; sleep 4242", idle_ms=300)
    assert (idle.cause, idle.detail[:5]) == ("timed_out", "idle:")
    talk = "import time\nfor n in range(12): print(n, flush=True); time.sleep(0.1)"
    busy, output = await run(sandbox, talk, python=True, idle_ms=1_000)
    assert (busy.cause, busy.exit_code, len(output.split())) == ("exited", 0, 12)


async def test_a_job_that_closed_its_output_is_idle_all_the_same(sandbox: NativeSandbox) -> None:
    idle, _ = await run(sandbox, "exec >&- 2>&-; sleep 4242", idle_ms=300)
    assert (idle.cause, idle.detail[:5]) == ("timed_out", "idle:")


async def test_a_job_that_works_in_silence_is_not_idle(sandbox: NativeSandbox) -> None:
    held(sandbox, Limit.CPU_TIME)
    work = "import time\nwhile time.process_time() < 0.5: pass"
    outcome, _ = await run(sandbox, work, python=True, idle_ms=patient(800), cpu_millis=500)
    assert (outcome.cause, outcome.exit_code) == ("exited", 0)


_READ = """
import mmap, os, time
path = max((entry.path for entry in os.scandir("/usr/bin") if entry.is_file()),
           key=lambda path: os.stat(path).st_size)
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
block, left, start = mmap.mmap(-1, 1 << 18), 3 << 20, time.monotonic()
while left > 0:
    left -= os.readv(fd, [block]) or left
print(time.monotonic() - start)
"""


async def test_reading_from_disk_is_throttled_and_counted(sandbox: NativeSandbox) -> None:
    """A lower bound on time, which no load of the machine can break: 3 MiB at 2 MiB/s."""
    held(sandbox, Limit.IO)
    outcome, output = await run(sandbox, _READ, python=True, io_read_bytes_per_s=2 * MIB)
    if "Error" in output:
        pytest.skip(f"no O_DIRECT on this file system: {output[-100:]}")
    assert float(output) > 0.9
    assert outcome.io_read_bytes is not None and outcome.io_read_bytes >= 3 * MIB


_ESCAPE = """
import os
print(sorted(os.sched_getaffinity(0)))
try: os.sched_setaffinity(0, range(os.cpu_count()))
except OSError as error: print(error.strerror)
print(sorted(os.sched_getaffinity(0)))
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("Mems_allowed_l")])
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU: nothing to bind to")
async def test_a_job_stays_on_its_cpus(sandbox: NativeSandbox) -> None:
    last = max(os.sched_getaffinity(0))
    outcome, output = await run(sandbox, _ESCAPE, python=True, cpus=(last,), mems=(0,))
    assert outcome.exit_code == 0, output
    lines = output.splitlines()
    assert lines[0] == f"[{last}]"
    if Limit.CPUSET in sandbox.enforcement.enforced:
        assert lines[-2] == f"[{last}]"
    else:
        assert "may leave" in sandbox.enforcement.missing[Limit.CPUSET]
    free, output = await run(sandbox, _ESCAPE, python=True)
    assert free.exit_code == 0 and len(output.splitlines()[0].split(",")) > 1


async def test_cpus_that_do_not_exist_are_the_platform_s_fault(sandbox: NativeSandbox) -> None:
    outcome, _ = await run(sandbox, "true", cpus=(100_000,))
    assert outcome.cause == "sandbox_failed" and outcome.detail


async def test_inodes_of_the_work_directory_are_bounded(sandbox: NativeSandbox) -> None:
    fill = "for n in $(seq 100); do : > f$n || exit 9; done"
    outcome, _ = await run(sandbox, fill, work_inodes=20)
    assert outcome.exit_code in {2, 9}  # a failed redirection ends some shells


async def test_usage_tells_user_from_system_time_and_waiting(sandbox: NativeSandbox) -> None:
    held(sandbox, Limit.CPU)
    burn = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done"
    outcome, _ = await run(sandbox, burn, cpu_millis=20)  # less than any busy machine leaves it
    assert outcome.cpu_user_ms is not None and outcome.cpu_system_ms is not None
    assert outcome.cpu_user_ms > 0
    assert abs(outcome.cpu_user_ms + outcome.cpu_system_ms - outcome.cpu_ms) <= 10
    assert outcome.throttled_ms is not None and outcome.throttled_ms > 0
    if Path("/proc/pressure/cpu").exists() and sandbox.enforcement.cgroup in {"v2", "hybrid"}:
        assert outcome.pressure is not None and outcome.pressure.cpu_us > 0
    else:
        assert outcome.pressure is None


async def test_out_of_memory_beats_the_signal_and_the_time(sandbox: NativeSandbox) -> None:
    held(sandbox, Limit.MEMORY)
    outcome, _ = await run(
        sandbox, "head -c 200m /dev/zero | tail", memory_bytes=32 * MIB, cpu_ms=30_000
    )
    assert outcome.cause == "out_of_memory"
    suicide, _ = await run(sandbox, "kill -KILL $$")
    assert (suicide.cause, suicide.signal) == ("signalled", signal.SIGKILL)
