"""What a container runtime is given: whose fault it is where there is no room, and what is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from node_agent.launcher import kernel
from node_agent.launcher.child import Input
from node_agent.launcher.jobs import Job
from node_agent.oci.job import OciJob, Removal

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
IDS = (os.getuid(), os.getgid())


class Runtime:
    own_kernel = False


class Shared:
    runtime = Runtime()


class Spec:
    """Of a job with these inputs."""

    memory_bytes = pids_max = cpu_millis = 1

    def __init__(self, *inputs: Input) -> None:
        self.inputs = list(inputs)


def raises(*_: object) -> None:
    raise NO_SPACE


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that is launched, so that it has a /work, and not yet assigned."""
    made: Any = object.__new__(OciJob)
    (tmp_path / "work").mkdir()
    made._shared, made._bundle, made._ids, made.spent = Shared(), os.fspath(tmp_path), IDS, []
    made.failure = made.not_executed = None
    made.pidfd, made._processes_max = -1, 1
    monkeypatch.setattr(Job, "assign", lambda *_: None)
    monkeypatch.setattr(OciJob, "_write_config", lambda *_: None)
    monkeypatch.setattr(OciJob, "_start_runtime", lambda *_: None)
    return made


def assign(job: Any, *inputs: Input) -> None:
    """As the launcher does; what it hands over is closed, and an end is told at once."""
    content = os.memfd_create("inputs")
    os.write(content, b"12345")
    os.lseek(content, 0, os.SEEK_SET)
    given = [*(os.open("/", os.O_PATH) for _ in range(3)), content]
    before = len(list(Path("/proc/self/fd").iterdir()))
    job.assign(Spec(*inputs), given, [])
    ended = job.failure is not None or job.not_executed is not None
    assert len(list(Path("/proc/self/fd").iterdir())) == before - len(given) + ended
    if ended:
        assert os.eventfd_read(job.pidfd) == 1
        os.close(job.pidfd)


@pytest.mark.parametrize("step", ["_write_config", "_start_runtime"])
def test_a_full_disk_of_the_launcher_s_is_not_the_job_s_fault(
    job: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The bundle lies in the agent's state directory; another node has room for it."""
    monkeypatch.setattr(OciJob, step, raises)
    assign(job, Input("in/a", 5, writable=False))
    assert job.failure == ("launch", errno.ENOSPC, str(NO_SPACE))
    assert job.not_executed is None


def test_inputs_that_find_no_room_in_work_are(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sendfile", raises)
    assign(job, Input("in/a", 5, writable=False))
    assert job.failure is None
    assert job.not_executed == (126, f"inputs: {NO_SPACE}")


def test_inputs_that_come_short_are_the_platform_s_fault(job: Any) -> None:
    assign(job, Input("a", 6, writable=True))
    assert job.failure[1] == errno.EIO and job.not_executed is None


def test_inputs_that_fit_are_there(job: Any, tmp_path: Path) -> None:
    assign(job, Input("in/a", 2, writable=False), Input("b", 3, writable=True))
    assert (job.failure, job.not_executed, job.pidfd) == (None, None, -1)
    assert (tmp_path / "work/in/a").read_bytes() == b"12"
    assert (tmp_path / "work/b").read_bytes() == b"345"


class Gone:
    """Children and cgroup of a job of which nothing is left."""

    def wait(self, _pid: int) -> tuple[int, None]:
        return 0, None

    def kill(self) -> None: ...

    def remove(self) -> bool:
        return True


def test_a_bundle_whose_work_was_never_mounted_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """umount2 says EINVAL, which ended the launcher."""

    def not_mounted(target: str) -> None:
        raise OSError(errno.EINVAL, f"umount {target}")

    monkeypatch.setattr(kernel, "umount", not_mounted)
    (tmp_path / "bundle/work").mkdir(parents=True)
    removal: Any = Removal(Gone())  # type: ignore[arg-type] # a fake
    removal.bundle, removal._children, removal._deleting = f"{tmp_path}/bundle", Gone(), 1
    assert removal.remove()
    assert not (tmp_path / "bundle").exists()
