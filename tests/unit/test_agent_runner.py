"""One attempt on the agent's side: what becomes of it where the machine is in the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from idl.control import AssignIntent
from idl.jobs import JobSpec
from idl.settings import KafkaSettings
from node_agent.core.gpus import NO_GPUS
from node_agent.runner import AttemptRunner, RunnerPorts
from node_agent.sandbox.plan import SandboxOutcome

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
        "fetcher": None, "output": folder, "record": lambda _: True,
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
