"""A runtime in the foreground that dies with its job's cgroup: whose fault that is."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from node_agent.oci.job import OciJob


class Cgroup:
    """Memory alone; `kills` None: it was removed."""

    def __init__(self, kills: int | None) -> None:
        self._kills = kills

    def oom_kills(self) -> int:
        if self._kills is None:
            raise OSError(19, "no such device")
        return self._kills

    def used(self) -> dict[str, Any]:
        return {"cpu_us": 7_000}


class Runtime:
    name, own_kernel, detaches = "runsc", True, False


class Shared:
    runtime = Runtime()


def ended(bundle: Path, code: int, kills: int | None) -> dict[str, object]:
    """The outcome of a job whose runtime ended so."""
    job: Any = object.__new__(OciJob)
    job.cgroup, job._shared, job._bundle = Cgroup(kills), Shared(), os.fspath(bundle)
    job.started, job.ended_by, job.why = True, "", ""
    job.failure = job.not_executed = job.status = None
    job.started_at, job.ended_at, job.usage_cpu_us, job.usage_rss_bytes = 1.0, 1.5, 0, 0
    job.cpu_ms = 0
    job._foreground_ended(code)
    outcome: dict[str, object] = job.outcome(0)
    return outcome


def test_memory_oom_group_kills_the_runtime_with_the_job(tmp_path: Path) -> None:
    outcome = ended(tmp_path, -signal.SIGKILL, 3)
    assert (outcome["cause"], outcome["signal"]) == ("out_of_memory", signal.SIGKILL)
    assert (outcome["wall_ms"], outcome["cpu_ms"]) == (500, 7)


@pytest.mark.parametrize("kills", [0, None], ids=["enough memory", "cgroup removed"])
def test_a_runtime_that_somebody_killed_is_no_fault_of_the_job(
    tmp_path: Path, kills: int | None
) -> None:
    outcome = ended(tmp_path, -signal.SIGKILL, kills)
    assert outcome["cause"] == "sandbox_failed"
    assert outcome["detail"] == "step 'runsc': exit code -9, and nothing in its log"


def test_a_job_that_ended_by_itself_is_told_by_its_exit_code(tmp_path: Path) -> None:
    assert ended(tmp_path, 3, 0)["exit_code"] == 3
    assert ended(tmp_path, 128 + signal.SIGTERM, 0)["signal"] == signal.SIGTERM
