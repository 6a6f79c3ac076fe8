"""The native sandbox end to end on this machine: outcomes, limits, concurrency, clean-up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import (
    MIB,
    CommandRefused,
    Limit,
    LimitNotEnforced,
    PlanRefused,
    SandboxOutcome,
    SandboxPlan,
    SandboxUnavailable,
    unheld,
)
from node_agent.sandbox.settings import SandboxSettings
from tests.attacks.runner import leftovers
from tests.integration.sandboxes import started_or_skip, zygote

INSTANCE = f"test-{os.getpid()}"


@pytest.fixture
async def sandbox() -> AsyncIterator[NativeSandbox]:
    started = await started_or_skip(SandboxSettings(instance=INSTANCE))
    yield started
    await started.close()
    assert leftovers(INSTANCE) == []


def job(sandbox: NativeSandbox, key: str, script: str, **fields: Any) -> SandboxPlan:
    defaults: dict[str, Any] = {
        "argv": ("/bin/sh", "-c", script),
        "require": sandbox.enforcement.enforced,
        "wall_ms": 120_000,
        "grace_ms": 50,
        "memory_bytes": 64 * MIB,
        "pids_max": 32,
    }
    return SandboxPlan(key=key, **(defaults | fields))


async def several(
    sandbox: NativeSandbox, count: int, script: str
) -> list[asyncio.Task[SandboxOutcome]]:
    """So many jobs, which have all started."""
    started = [asyncio.Event() for _ in range(count)]
    running = [
        asyncio.create_task(sandbox.run(job(sandbox, f"a{n}", script), b"", None, event.set))
        for n, event in enumerate(started)
    ]
    await asyncio.gather(*(event.wait() for event in started))
    return running


async def test_a_job_reads_its_payload_and_leaves_a_result(sandbox: NativeSandbox) -> None:
    output: list[tuple[str, bytes]] = []
    started: list[bool] = []
    outcome = await sandbox.run(
        job(sandbox, "a", "cat; echo oops >&2; printf done > $OUTRIDER_RESULT; exit 7"),
        b"payload",
        lambda stream, data: output.append((stream, data)),
        lambda: started.append(True),
    )
    assert (outcome.cause, outcome.exit_code, outcome.signal) == ("exited", 7, None)
    assert sorted(output) == [("stderr", b"oops\n"), ("stdout", b"payload")]
    assert (outcome.stdout_bytes, outcome.stderr_bytes) == (7, 5)
    assert outcome.result == b"done" and outcome.result_refused == ""
    assert started == [True]
    assert outcome.memory_peak_bytes > 0


def test_jobs_run_under_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def once() -> None:
        started = await started_or_skip(SandboxSettings(instance=INSTANCE + "-uv"))
        try:
            chunks: list[bytes] = []
            plan = job(started, "a", "cat; cp /bin/true result")
            payload = os.urandom(200_000)
            outcome = await started.run(plan, payload, lambda _, data: chunks.append(data))
            assert b"".join(chunks) == payload
            assert outcome.exit_code == 0 and outcome.result
        finally:
            await started.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(once())


async def test_what_a_job_leaves_is_reaped_before_its_end_is_told() -> None:
    """Without cgroups CPU time is what was reaped: also that of processes that outlive the job's
    own."""
    nowhere = SandboxSettings(instance=INSTANCE, mode="userns", cgroup_parent="/nowhere")
    sandbox = await started_or_skip(nowhere)
    assert Limit.CPU not in sandbox.enforcement.enforced
    burn = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo > f; exec sleep 4242"
    script = f"trap '' TERM; mkfifo f; setsid sh -c '{burn}' & read line < f; exit 3"
    outcome = await sandbox.run(job(sandbox, "left", script), b"")
    assert (outcome.cause, outcome.exit_code) == ("exited", 3)
    assert outcome.cpu_ms >= 30, "the loop takes more than 100 ms, all the rest less than 10"
    await sandbox.close()
    assert leftovers(INSTANCE) == []


async def test_a_signal_is_told_from_an_exit(sandbox: NativeSandbox) -> None:
    outcome = await sandbox.run(job(sandbox, "a", "kill -SEGV $$"), b"")
    assert (outcome.cause, outcome.signal) == ("signalled", signal.SIGSEGV)


@pytest.mark.parametrize(
    ("argv", "cwd", "code"),
    [
        (("no-such-program",), "/work", 127),
        (("/no/such/program",), "/work", 127),
        (("/etc/passwd",), "/work", 126),
        (("/bin/true",), "/no/such/folder", 127),
    ],
)
async def test_a_wrong_command_is_the_jobs_own_fault(
    sandbox: NativeSandbox, argv: tuple[str, ...], cwd: str, code: int
) -> None:
    outcome = await sandbox.run(job(sandbox, "a", "", argv=argv, cwd=cwd), b"")
    assert (outcome.cause, outcome.exit_code) == ("exited", code)
    assert outcome.detail


async def test_a_command_that_is_too_long_is_the_jobs_own_fault(sandbox: NativeSandbox) -> None:
    path = {"PATH": ":".join(f"/d{n}" for n in range(101))}
    for argv, env in ((("true",), path), (("x" * 60_000,), {"PATH": "/a:/b:/c:/d:/e:/f"})):
        outcome = await sandbox.run(job(sandbox, "a", "", argv=argv, env=env), b"")
        assert (outcome.cause, outcome.exit_code) == ("exited", 126)
    with pytest.raises(CommandRefused):
        await sandbox.run(job(sandbox, "a", "", argv=("/bin/true", "\1" * 40_000)), b"")
    long = await sandbox.run(job(sandbox, "a", "", argv=("/" + "\\" * 60_000,)), b"")
    assert (long.cause, long.exit_code) == ("exited", 127)
    assert (await sandbox.run(job(sandbox, "a", "true"), b"")).exit_code == 0, "it lives"


async def test_the_wall_time_ends_a_job(sandbox: NativeSandbox) -> None:
    outcome = await sandbox.run(job(sandbox, "a", "sleep 60", wall_ms=100, grace_ms=30_000), b"")
    assert outcome.cause == "timed_out" and outcome.signal == signal.SIGTERM


async def test_kill_asks_first_and_then_insists(sandbox: NativeSandbox) -> None:
    polite = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    stubborn = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    for script, grace_ms, expected in (
        (polite, 30_000, (5, None)),
        (stubborn, 50, (None, None)),
    ):
        ready = asyncio.Event()
        asked = job(sandbox, "a", script, grace_ms=grace_ms)
        running = asyncio.create_task(sandbox.run(asked, b"", lambda *_, e=ready: e.set()))
        await ready.wait()
        assert await sandbox.kill("a", "no longer wanted")
        outcome = await running
        assert (outcome.cause, outcome.detail) == ("killed", "no longer wanted")
        assert (outcome.exit_code, outcome.signal) == expected
    assert not await sandbox.kill("a", "too late")


async def test_cancelling_a_run_kills_its_job(sandbox: NativeSandbox) -> None:
    started = asyncio.Event()
    running = asyncio.create_task(
        sandbox.run(job(sandbox, "a", "trap '' TERM; sleep 4242"), b"", None, started.set)
    )
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert leftovers("none-of-this-name") == []  # the sleeper is gone


async def test_out_of_memory_is_told_from_other_kills(sandbox: NativeSandbox) -> None:
    if Limit.MEMORY not in sandbox.enforcement.enforced:
        pytest.skip(sandbox.enforcement.missing[Limit.MEMORY])
    hungry = job(sandbox, "hungry", "head -c 200m /dev/zero | tail", memory_bytes=32 * MIB)
    modest = job(sandbox, "modest", "sleep 0.3; exit 0")
    first, second = await asyncio.gather(sandbox.run(hungry, b""), sandbox.run(modest, b""))
    assert first.cause == "out_of_memory"
    assert (second.cause, second.exit_code) == ("exited", 0)


async def test_twenty_jobs_at_once(sandbox: NativeSandbox) -> None:
    outcomes = await asyncio.gather(
        *(
            sandbox.run(job(sandbox, f"job-{n}.1", f"cat > result; exit {n}"), str(n).encode())
            for n in range(20)
        )
    )
    assert [outcome.exit_code for outcome in outcomes] == list(range(20))
    assert [outcome.result for outcome in outcomes] == [str(n).encode() for n in range(20)]


async def test_a_plan_that_requires_what_is_not_held_is_refused(sandbox: NativeSandbox) -> None:
    everything = job(sandbox, "a", "true", require=frozenset(Limit))
    lacking = unheld(everything, sandbox.enforcement.missing)
    if lacking:
        with pytest.raises(LimitNotEnforced) as caught:
            await sandbox.run(everything, b"")
        assert caught.value.limits == lacking
    else:
        assert (await sandbox.run(everything, b"")).exit_code == 0


async def test_bad_plans_are_refused_before_launch(sandbox: NativeSandbox) -> None:
    for fields in (
        {"argv": ("/bin/true", "x" * 200_000)},
        {"devices": ("/dev/nvidia0",)},
        {"network": "host", "require": frozenset()},
        {"env": {"A": "\0"}},
        {"argv": ("\udc80",)},
    ):
        with pytest.raises(PlanRefused):
            await sandbox.run(job(sandbox, "a", "true", **fields), b"")
    assert (await sandbox.run(job(sandbox, "a", "true"), b"")).exit_code == 0


async def test_the_network_profile_opens_the_host_s_network_and_nothing_else() -> None:
    """Only where the operator allows it; every other limit is still required."""
    settings = SandboxSettings(instance=INSTANCE + "-net", allow_host_network=True)
    opened = await started_or_skip(settings)
    require = opened.enforcement.enforced - {Limit.NETWORK}
    script = "grep -c : /proc/net/dev; ls /home /root 2>/dev/null; echo x > /usr/x"
    try:
        for network, required in (("host", require), ("none", opened.enforcement.enforced)):
            output: list[bytes] = []
            plan = job(opened, network, script, network=network, require=required)
            outcome = await opened.run(plan, b"", lambda *given, o=output: o.append(given[1]))
            interfaces = Path("/proc/net/dev").read_text().count(":") if network == "host" else 1
            assert int(b"".join(output).split()[0]) == interfaces
            assert outcome.exit_code != 0 and b"Read-only" in b"".join(output)
    finally:
        await opened.close()


async def test_large_payload_and_result_pass_through(sandbox: NativeSandbox) -> None:
    payload = os.urandom(3 * MIB)
    plan = job(sandbox, "a", "cat > result", result_bytes_max=4 * MIB)
    outcome = await sandbox.run(plan, payload)
    assert outcome.result == payload


async def test_a_dead_launcher_takes_its_jobs_along_and_is_swept() -> None:
    instance = INSTANCE + "-dead"
    first = await started_or_skip(SandboxSettings(instance=instance))
    running = await several(first, 3, "trap '' TERM; sleep 4242 & wait")
    os.kill(first.launcher_pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*running)
    assert {outcome.cause for outcome in outcomes} == {"sandbox_failed"}
    assert not first.alive
    with pytest.raises(SandboxUnavailable):
        await first.run(job(first, "b", "true"), b"")
    await first.close()
    second = await NativeSandbox.start(SandboxSettings(instance=instance))
    try:
        assert (await second.run(job(second, "b", "true"), b"")).exit_code == 0
        names = {Path(path).name for path in leftovers(instance)}
        assert len(names) <= 1, f"more than the second launcher's own directories: {names}"
    finally:
        await second.close()
    assert leftovers(instance) == []


async def test_a_launcher_killed_while_it_sets_jobs_up_leaves_nothing() -> None:
    """44: SIGKILL at an arbitrary point between clone3 and exec."""
    instance = INSTANCE + "-storm"
    try:
        for wait_s in (0.0, 0.005, 0.02):
            storm = await NativeSandbox.start(SandboxSettings(instance=instance))
            running = [
                asyncio.create_task(storm.run(job(storm, f"a{n}", "sleep 4242"), b""))
                for n in range(12)
            ]
            await asyncio.sleep(wait_s)
            os.kill(storm.launcher_pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*running, return_exceptions=True)
            for outcome in outcomes:
                assert isinstance(outcome, SandboxUnavailable) or (
                    getattr(outcome, "cause", "") == "sandbox_failed"
                )
            await storm.close()
        last = await NativeSandbox.start(SandboxSettings(instance=instance))
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    await last.close()
    assert leftovers(instance) == []


async def test_a_killed_zygote_costs_no_job(sandbox: NativeSandbox) -> None:
    """It holds nothing: the launcher makes another and asks again. Jobs that run, run on."""
    running = asyncio.create_task(sandbox.run(job(sandbox, "old", "sleep 1; exit 3"), b""))
    await asyncio.sleep(0.3)
    os.kill(zygote(sandbox), signal.SIGKILL)
    after = [sandbox.run(job(sandbox, f"new{n}", "exit 4"), b"") for n in range(3)]
    assert [outcome.exit_code for outcome in await asyncio.gather(*after)] == [4, 4, 4]
    assert (await running).exit_code == 3


async def test_the_umask_of_a_job_is_not_the_agents() -> None:
    before = os.umask(0o077)
    try:
        sandbox = await started_or_skip(SandboxSettings(instance=INSTANCE))
    finally:
        os.umask(before)
    output: list[bytes] = []
    plan = job(sandbox, "umask", "umask")
    await sandbox.run(plan, b"", lambda _stream, data: output.append(data))
    await sandbox.close()
    assert b"".join(output).strip() == b"0022"


async def test_close_with_running_jobs_ends_them(sandbox: NativeSandbox) -> None:
    other = await NativeSandbox.start(SandboxSettings(instance=INSTANCE + "-close"))
    running = await several(other, 8, "trap '' TERM; sleep 4242")
    await other.close()
    assert {ended.cause for ended in await asyncio.gather(*running)} == {"killed"}
    assert leftovers(INSTANCE + "-close") == []


async def test_two_launchers_do_not_sweep_each_other(sandbox: NativeSandbox) -> None:
    started = asyncio.Event()
    running = asyncio.create_task(
        sandbox.run(job(sandbox, "a", "sleep 4242", grace_ms=30_000), b"", None, started.set)
    )
    await started.wait()
    other = await NativeSandbox.start(SandboxSettings(instance=INSTANCE))
    await other.close()
    assert await sandbox.kill("a", "still there")
    outcome = await running
    assert (outcome.cause, outcome.signal) == ("killed", signal.SIGTERM)


async def test_settings_that_cannot_work_are_one_clear_line() -> None:
    for fields in (
        {"extra_ro_paths": ("/no/such/path",)},
        {"extra_ro_paths": ("relative",)},
        {"python": "/no/such/python"},
        {"instance": "../x"},
    ):
        with pytest.raises(SandboxUnavailable) as caught:
            await NativeSandbox.start(SandboxSettings(**fields))
        assert "\n" not in str(caught.value)
