"""The launcher's loop: how long it sleeps."""

from __future__ import annotations

import time
from typing import cast

import pytest

from node_agent.launcher.jobs import Job
from node_agent.launcher.main import Launcher

INT_MAX = 2**31 - 1


class FakeJob:
    """Something to be done at a time to come."""

    def __init__(self, due_s: float) -> None:
        self._due = time.monotonic() + due_s

    def next_deadline(self) -> float:
        return self._due


def sleeps(*due_s: float, orphan_s: float | None = None) -> float:
    """What the loop of a launcher with these jobs gives its poll."""
    idle = object.__new__(Launcher)
    idle._jobs = {str(due): cast("Job", FakeJob(due)) for due in due_s}
    idle._dying, idle._closing = [], False
    idle._to_prepare = lambda: None  # type: ignore[method-assign] # nothing is made ahead
    ends_at = float("inf") if orphan_s is None else time.monotonic() + orphan_s
    idle._orphan_ends_at = ends_at
    return idle._timeout_s()


@pytest.mark.parametrize("days", [1, 25, 30, 10_000, 10**9])
def test_a_deadline_of_many_days_is_one_that_the_poll_can_wait_for(days: int) -> None:
    """poll() raises OverflowError beyond an int of milliseconds, which ended every job."""
    for wait_s in (sleeps(days * 86_400.0), sleeps(orphan_s=days * 86_400.0)):
        assert 0 < wait_s * 1000 <= INT_MAX


def test_the_soonest_is_waited_for_and_nothing_for_ever() -> None:
    assert sleeps() == -1
    assert 0 <= sleeps(10, 7200) <= 10
    assert sleeps(-1.0) == 0
