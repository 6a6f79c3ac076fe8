"""What the OCI launcher watches of a job: the number of a closed descriptor is the next job's."""

from __future__ import annotations

import os
import select
from typing import cast

import pytest

from node_agent.launcher.jobs import Job
from node_agent.oci import main as launcher
from node_agent.oci.main import OciLauncher


class FakeCgroup:
    oom_event_fd = -1


class FakeJob:
    """Three things in turn to wait for, as a runtime, its container and our init are."""

    key, started, slot, control = "", False, 0, None

    def __init__(self) -> None:
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
        self.pidfd, self.spent = self.fds[0], list[int]()
        self.cgroup, self.remains = FakeCgroup(), self

    def turn(self) -> None:
        """What `OciJob.reap` does when one of them has ended."""
        self.spent.append(self.pidfd)
        self.pidfd = self.fds[self.fds.index(self.pidfd) + 1]

    def drop(self, fd: int) -> None:
        os.close(fd)

    def close(self) -> None:
        os.close(self.pidfd)

    def remove(self) -> bool:
        return True


@pytest.mark.parametrize("turns", range(3))
@pytest.mark.parametrize("looked_between", [True, False], ids=["loop", "self-test"])
def test_nothing_of_a_released_job_stays_watched(
    turns: int, *, looked_between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "OciJob", FakeJob)
    ours = object.__new__(OciLauncher)
    ours._by_fd, ours._poll = {}, select.epoll()
    ours._free_slots, ours._dying = [], []
    fake = FakeJob()
    job = cast("Job", fake)
    ours._follow(job)
    for _ in range(turns):
        fake.turn()
        if looked_between:
            ours._follow(job)
            assert list(ours._by_fd) == [fake.pidfd]
    ours._release(job)
    assert ours._by_fd == {}
    for fd in fake.fds[turns + 1 :]:
        os.close(fd)
    ours._poll.close()
