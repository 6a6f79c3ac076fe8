"""Launchers without an agent: what runs goes on, what ended is kept, nothing stays for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from node_agent.keeper import LauncherKeeper
from node_agent.launcher import doors
from node_agent.launcher import main as launcher
from node_agent.sandbox import channel, native, outputs
from node_agent.sandbox.channel import SOCKET_NAME
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxOutcome, SandboxPlan, SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings
from tests.attacks.runner import leftovers

INSTANCE = f"adopt-{os.getpid()}"
WAIT_S = 120.0


def settings(name: str, **more: Any) -> SandboxSettings:
    return SandboxSettings(instance=f"{INSTANCE}-{name}", **more)


def plan(sandbox: NativeSandbox, key: str, script: str, **fields: Any) -> SandboxPlan:
    defaults: dict[str, Any] = {
        "argv": ("/bin/sh", "-c", script),
        "require": sandbox.enforcement.enforced,
        "wall_ms": 60_000,
        "grace_ms": 50,
        "memory_bytes": 64 * MIB,
        "pids_max": 32,
    }
    return SandboxPlan(key=key, **(defaults | fields))


async def started(name: str, home: Path, **more: Any) -> NativeSandbox:
    try:
        return await NativeSandbox.start(settings(name, **more), home)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def begin(
    sandbox: NativeSandbox, job: SandboxPlan, payload: bytes = b"", output: bytearray | None = None
) -> tuple[asyncio.Task[SandboxOutcome], asyncio.Event]:
    """A run in the background, and the moment when its program has started."""
    running = asyncio.Event()

    def take(_stream: str, data: bytes) -> None:
        if output is not None:
            output.extend(data)

    return asyncio.create_task(sandbox.run(job, payload, take, running.set, keep=True)), running


async def lose(sandbox: NativeSandbox, *tasks: asyncio.Task[SandboxOutcome]) -> None:
    """The agent is gone, as the launcher sees it; that a job ended it may just have heard."""
    sandbox.detach()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    heard = (asyncio.CancelledError, SandboxOutcome)
    assert all(isinstance(result, heard) for result in results), results


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def adopted(name: str, home: Path, **more: Any) -> NativeSandbox:
    found = await NativeSandbox.adopt(settings(name, **more), home)
    assert found is not None
    return found


async def test_exit_code_output_result_and_usage_survive_the_agent(tmp_path: Path) -> None:
    first = await started("all", tmp_path)
    early = bytearray()
    script = "echo early; read line; sleep 0.3; echo $line; printf done > $OUTRIDER_RESULT; exit 7"
    job = plan(first, "a.1", script)
    task, _ = begin(first, job, b"payload\n", early)
    await until(lambda: early.startswith(b"early\n"), "no output")
    pid = first.launcher_pid
    await lose(first, task)
    second = await adopted("all", tmp_path)
    assert second.launcher_pid == pid and second.found == {"a.1"}
    assert second.enforcement == first.enforcement
    outcome = await second.resume(job, {"stdout": len(early)}, lambda _, data: early.extend(data))
    assert (outcome.cause, outcome.exit_code, outcome.result) == ("exited", 7, b"done")
    assert early == b"early\npayload\n"
    assert (outcome.stdout_bytes, outcome.output_truncated) == (14, False)
    assert outcome.wall_ms >= 300 and outcome.memory_peak_bytes > 0
    await second.forget("a.1")
    await second.close()
    assert leftovers(f"{INSTANCE}-all") == []


async def test_an_end_without_an_agent_is_kept_until_it_is_forgotten(tmp_path: Path) -> None:
    first = await started("kept", tmp_path)
    script = "sleep 0.2; head -c 400000 /dev/zero; printf done > $OUTRIDER_RESULT; exit 3"
    job = plan(first, "a.1", script)
    seen = bytearray()
    task, running = begin(first, job, output=seen)
    await running.wait()
    await lose(first, task)
    for _ in range(2):  # told again to whoever comes, as long as nobody said forget
        await asyncio.sleep(0.6)
        again = await adopted("kept", tmp_path)
        assert again.found == {"a.1"}
        again.detach()
    last = await adopted("kept", tmp_path)
    outcome = await last.resume(job, {"stdout": len(seen)}, lambda _, data: seen.extend(data))
    assert (outcome.exit_code, outcome.result, len(seen)) == (3, b"done", 400_000)
    await last.forget("a.1")
    last.detach()
    await until(lambda: gone(last.launcher_pid), "a launcher with nothing to keep stays")
    assert await NativeSandbox.adopt(settings("kept"), tmp_path) is None
    assert leftovers(f"{INSTANCE}-kept") == []


async def test_output_beyond_the_pipe_waits_and_goes_on(tmp_path: Path) -> None:
    first = await started("flood", tmp_path)
    size = 5 * MIB
    job = plan(first, "a.1", f"sleep 0.3; head -c {size} /dev/zero; exit 4", stdout_bytes_max=size)
    holder, holding = begin(first, plan(first, "b.1", "sleep 4242"))
    await holding.wait()
    await lose(first, holder)
    second = await adopted("flood", tmp_path)
    read = bytearray()
    task, running = begin(second, job, output=read)
    await running.wait()
    await lose(second, task)
    await asyncio.sleep(0.3)
    third = await adopted("flood", tmp_path)
    await third.discard("b.1")
    outcome = await third.resume(job, {"stdout": len(read)}, lambda _, data: read.extend(data))
    assert (outcome.cause, outcome.exit_code) == ("exited", 4)
    assert (outcome.stdout_bytes, outcome.output_truncated) == (size, False)
    assert read == bytes(size), "each byte was read once, by the second agent or by the third"
    await third.close()
    assert leftovers(f"{INSTANCE}-flood") == []


async def test_a_payload_is_whole_although_its_agent_died(tmp_path: Path) -> None:
    first = await started("payload", tmp_path)
    job = plan(first, "a.1", "sleep 0.3; wc -c | tr -d ' \\n' > $OUTRIDER_RESULT")
    task, running = begin(first, job, os.urandom(3 * MIB))
    await running.wait()
    await lose(first, task)
    second = await adopted("payload", tmp_path)
    assert (await second.resume(job, {})).result == str(3 * MIB).encode()
    await second.close()
    assert leftovers(f"{INSTANCE}-payload") == []


async def test_what_an_earlier_agent_discarded_is_told(tmp_path: Path) -> None:
    first = await started("cut", tmp_path)
    early = bytearray()
    job = plan(first, "a.1", "echo 0123456789; sleep 0.3; exit 0", stdout_bytes_max=4)
    task, _ = begin(first, job, b"", early)
    await until(lambda: early == b"0123", "no output")
    await lose(first, task)
    second = await adopted("cut", tmp_path)
    outcome = await second.resume(job, {"stdout": 4})
    assert outcome.output_truncated and outcome.stdout_bytes == 4
    await second.close()


async def test_an_orphan_is_killed_after_its_grace(tmp_path: Path) -> None:
    first = await started("grace", tmp_path, orphan_grace_s=0.3)
    task, running = begin(first, plan(first, "a.1", "trap '' TERM; sleep 4242"))
    await running.wait()
    pid = first.launcher_pid
    await lose(first, task)
    await until(lambda: gone(pid), "the launcher outlived its grace")
    assert await NativeSandbox.adopt(settings("grace"), tmp_path) is None
    assert leftovers(f"{INSTANCE}-grace") == []


async def test_sigterm_ends_an_orphan_and_its_jobs(tmp_path: Path) -> None:
    first = await started("term", tmp_path)
    task, running = begin(first, plan(first, "a.1", "trap '' TERM; sleep 4242"))
    await running.wait()
    pid = first.launcher_pid
    await lose(first, task)
    os.kill(pid, signal.SIGTERM)
    await until(lambda: gone(pid), "SIGTERM did not end it")
    assert leftovers(f"{INSTANCE}-term") == []


async def test_jobs_never_see_the_home() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as visible:  # a job's /tmp is its own
        Path(visible).chmod(0o755)
        home = Path(visible) / "state"
        home.mkdir()
        (home / "secret").write_text("secret")
        first = await started("home", home, extra_ro_paths=(visible,))
        script = f"ls {visible} > $OUTRIDER_RESULT; ls -a {home} >> $OUTRIDER_RESULT"
        outcome = await first.run(plan(first, "a.1", script), b"")
        assert (outcome.exit_code, outcome.result) == (0, b"state\n.\n..\n")
        await first.close()
    assert leftovers(f"{INSTANCE}-home") == []


async def test_the_socket_is_ours_alone_and_its_path_may_be_long(tmp_path: Path) -> None:
    deep = tmp_path / ("long-" * 30)  # longer than sun_path
    deep.mkdir()
    first = await started("socket", deep)
    assert stat.S_IMODE((deep / SOCKET_NAME).stat().st_mode) == 0o600
    task, running = begin(first, plan(first, "a.1", "sleep 0.5; exit 5"))
    await running.wait()
    await lose(first, task)
    second = await adopted("socket", deep)
    assert (await second.resume(plan(first, "a.1", ""), {})).exit_code == 5
    await second.close()
    assert leftovers(f"{INSTANCE}-socket") == []


def test_both_ends_speak_the_same_protocol() -> None:
    assert native.PROTOCOL == launcher.PROTOCOL
    assert channel.MESSAGE_BYTES_MAX == doors.MESSAGE_BYTES_MAX


async def test_a_launcher_that_speaks_otherwise_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await started("other", tmp_path)
    task, running = begin(first, plan(first, "a.1", "sleep 4242"))
    await running.wait()
    await lose(first, task)
    monkeypatch.setattr(native, "PROTOCOL", native.PROTOCOL + 1)
    assert await NativeSandbox.adopt(settings("other"), tmp_path) is None
    assert gone(first.launcher_pid)
    monkeypatch.undo()
    swept = await started("other", tmp_path)
    await swept.close()
    assert leftovers(f"{INSTANCE}-other") == []


AGENT = """
import asyncio, sys, time
from pathlib import Path
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxPlan
from node_agent.sandbox.settings import SandboxSettings

async def main():
    def started():  # and reads nothing any more
        print(sandbox.launcher_pid, flush=True)
        time.sleep(600)
    sandbox = await NativeSandbox.start(SandboxSettings(instance=sys.argv[1]), Path(sys.argv[2]))
    script = "read x; sleep 0.5; echo $x; exit 9"
    plan = SandboxPlan(key="a.1", argv=("/bin/sh", "-c", script), require=frozenset())
    await sandbox.run(plan, b"hello\\n", None, started, keep=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_real_agent_process_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    name = f"real{int(number)}"
    probe = await started(name, tmp_path)
    await probe.close()
    agent = subprocess.Popen(  # noqa: ASYNC220 - it is to be killed, not awaited
        [sys.executable, "-c", AGENT, f"{INSTANCE}-{name}", str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    assert agent.stdout is not None
    pid = int(await asyncio.to_thread(agent.stdout.readline))
    agent.send_signal(number)
    agent.wait()
    agent.stdout.close()
    second = await adopted(name, tmp_path)
    assert second.launcher_pid == pid
    seen = bytearray()
    job = SandboxPlan(key="a.1", argv=("x",), require=frozenset())
    outcome = await second.resume(job, {}, lambda _, data: seen.extend(data))
    assert (outcome.exit_code, bytes(seen)) == (9, b"hello\n")
    await second.close()
    assert leftovers(f"{INSTANCE}-{name}") == []


async def test_what_is_discarded_is_killed_and_forgotten(tmp_path: Path) -> None:
    first = await started("discard", tmp_path)
    runs: list[Awaitable[Any]] = []
    for key, script in (("a.1", "sleep 4242"), ("b.1", "exit 0")):
        task, running = begin(first, plan(first, key, script))
        await running.wait()
        runs.append(task)
    await until(lambda: len(first._running) == 1, "the short job did not end")
    await lose(first, runs[0])  # type: ignore[arg-type] # a task
    second = await adopted("discard", tmp_path)
    assert second.found == {"a.1", "b.1"}
    for key in sorted(second.found):
        await second.discard(key)
    assert second.found == frozenset()
    second.detach()
    third = await NativeSandbox.adopt(settings("discard"), tmp_path)
    if third is not None:
        await third.close()
    await until(lambda: leftovers(f"{INSTANCE}-discard") == [], "something was left")


async def test_files_of_a_job_that_ended_without_an_agent_are_collected(tmp_path: Path) -> None:
    first = await started("files", tmp_path)
    job = plan(
        first, "a.1", "sleep 0.3; echo kept > out; ln -s /etc/passwd l", outputs=("out", "l")
    )
    task, running = begin(first, job)
    await running.wait()
    await lose(first, task)
    await asyncio.sleep(0.6)
    await lose(await adopted("files", tmp_path))
    agent = await adopted("files", tmp_path)
    found: list[outputs.Listing] = []

    async def take(work_fd: int) -> None:
        found.append(outputs.find(work_fd, job.outputs))
        assert outputs.read(work_fd, found[0].files[0]) == b"kept\n"

    assert (await agent.resume(job, {}, on_work=take)).exit_code == 0
    assert [file.name for file in found[0].files] == ["out"]
    assert found[0].missing == {"l": "not a regular file"}
    await agent.forget("a.1")
    await agent.close()
    assert leftovers(f"{INSTANCE}-files") == []


async def test_one_with_other_settings_is_replaced_once_it_is_idle(tmp_path: Path) -> None:
    first = await started("upgrade", tmp_path)
    task, running = begin(first, plan(first, "a.1", "sleep 0.5; exit 6"))
    await running.wait()
    await lose(first, task)
    same = await adopted("upgrade", tmp_path)
    assert not same.outdated
    same.detach()
    keeper, was_adopted = await LauncherKeeper.open(settings("upgrade", prepared=1), tmp_path)
    assert was_adopted and keeper.current.outdated
    watching = asyncio.create_task(keeper.watch(lambda: None))
    busy = await keeper.sandbox()
    assert busy.launcher_pid == first.launcher_pid, "it has a job"
    outcome = await busy.resume(plan(busy, "a.1", "x"), {})
    assert outcome.exit_code == 6
    await busy.forget("a.1")
    both = await asyncio.gather(keeper.sandbox(), keeper.sandbox())
    assert both[0] is both[1] is keeper.current
    assert gone(first.launcher_pid) and not both[0].outdated
    assert (await both[0].run(plan(both[0], "b.1", "exit 5"), b"")).exit_code == 5
    await keeper.close()
    await watching
    assert leftovers(f"{INSTANCE}-upgrade") == []
