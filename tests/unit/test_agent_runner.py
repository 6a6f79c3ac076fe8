"""One attempt on the agent's side: what becomes of it where the machine is in the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from idl.control import AssignIntent
from idl.jobs import JobSpec
from idl.settings import KafkaSettings
from node_agent import runner as runner_module
from node_agent.core.attempts import AttemptEnded
from node_agent.core.gpus import NO_GPUS
from node_agent.core.results import outcome_of
from node_agent.runner import AttemptRunner, RunnerPorts
from node_agent.sandbox.plan import CommandRefused, PlanRefused, SandboxOutcome

ASSIGN = AssignIntent(job="a", attempt=1, queue="q", spec=JobSpec(id="a", command=("x",)))


class FakeSandbox:
    """A launcher that runs nothing: every run ends so."""

    def __init__(self, end: Exception | SandboxOutcome) -> None:
        self._end = end
        self.forgotten: list[str] = []

    async def run(self, *_: object, **__: object) -> SandboxOutcome:
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    async def forget(self, key: str) -> None:
        self.forgotten.append(key)


class FakeImages:
    async def get(self, _name: str) -> None: ...


class FakeKeeper:
    def __init__(self, current: FakeSandbox) -> None:
        self.current = current

    async def sandbox(self) -> FakeSandbox:
        return self.current


def runner(sandbox: FakeSandbox, folder: Path, **ports: Any) -> AttemptRunner:
    """A runner of that launcher, without Kafka."""
    given: dict[str, Any] = {
        "keeper": FakeKeeper(sandbox), "gpus": NO_GPUS, "images": FakeImages(), "producer": None,
        "fetcher": None, "output": folder, "record": lambda _: True, "behind": lambda: False,
        "entry": lambda *_: SimpleNamespace(lease_until_ms=0), "tell": lambda _: None,
        "ended": lambda _: None,
    }  # fmt: skip
    settings = KafkaSettings(bootstrap="127.0.0.1:1", prefix="t.")
    return AttemptRunner(settings, "n1", RunnerPorts(**(given | ports)))


async def executed(sandbox: FakeSandbox, folder: Path) -> SandboxOutcome:
    output = cast("Any", SimpleNamespace(take=None))
    outcome, _ = await runner(sandbox, folder)._execute(ASSIGN, output)
    return outcome


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), FileNotFoundError(2, "no")])
async def test_what_the_machine_lacks_is_the_platform_s_fault_of_one_attempt(
    error: OSError, tmp_path: Path
) -> None:
    """It ended the agent."""
    outcome = await executed(FakeSandbox(error), tmp_path)
    assert (outcome.cause, outcome.detail) == ("sandbox_failed", str(error))


async def test_a_command_that_no_plan_has_room_for_is_the_job_s_own_fault(tmp_path: Path) -> None:
    """It would fail on every node, and was tried on several."""
    outcome = await executed(FakeSandbox(CommandRefused("240,000 bytes: too many")), tmp_path)
    assert outcome_of(outcome) == "failed" and "too many" in outcome.detail
    outcome = await executed(FakeSandbox(PlanRefused("devices are not here")), tmp_path)
    assert outcome_of(outcome) == "platform"


class FullDisk:
    """A journal that has no room for anything, until it has."""

    def __init__(self, folder: Path) -> None:
        self.behind = True
        self.said: list[object] = []
        self.looks = 0
        self._folder = folder

    async def finish(self, sandbox: FakeSandbox) -> None:
        """An attempt that ended as it was told, on such a disk."""
        ports = {
            "record": lambda _: not self.behind,
            "behind": self._look,
            "tell": self.said.append,
        }
        ours = runner(sandbox, self._folder, **ports)
        outcome = SandboxOutcome(cause="exited", exit_code=0)
        await ours._finish(ASSIGN, outcome, cast("Any", None), cast("Any", sandbox))

    def _look(self) -> bool:
        self.looks += 1
        return self.behind


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    async def reported(*_: object) -> None: ...

    monkeypatch.setattr(AttemptRunner, "_report", reported)
    monkeypatch.setattr(runner_module, "CATCH_UP_LOOK_S", 0.0)
    return FullDisk(tmp_path)


async def test_the_launcher_remembers_an_end_until_the_disk_does(disk: FullDisk) -> None:
    """What is delivered and forgotten, but not written, would run again after a restart."""
    sandbox = FakeSandbox(SandboxOutcome(cause="exited"))
    finishing = asyncio.create_task(disk.finish(sandbox))
    while disk.looks < 3:
        await asyncio.sleep(0)
        assert sandbox.forgotten == []
    disk.behind = False
    await finishing
    assert sandbox.forgotten == ["a.1"]
    assert disk.said == [AttemptEnded("a", 1)], "told at once, whatever the disk"


async def test_an_end_that_was_written_is_forgotten_at_once(disk: FullDisk) -> None:
    sandbox = FakeSandbox(SandboxOutcome(cause="exited"))
    disk.behind = False
    await disk.finish(sandbox)
    assert (sandbox.forgotten, disk.looks) == (["a.1"], 0)
