"""Which scheduling class a coordinator gets, and the timing that follows from it."""

import os

import pytest

from controlplane import priority
from idl.settings import ElectionSettings


def _refuse(*_: object) -> None:
    raise PermissionError


def test_the_best_class_that_the_kernel_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: None)
    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    assert priority.raise_priority() == "realtime"
    assert priority.raise_priority(realtime=False) == "nice"
    monkeypatch.setattr(os, "sched_setscheduler", _refuse)
    assert priority.raise_priority() == "nice"
    monkeypatch.setattr(os, "setpriority", _refuse)
    assert priority.raise_priority() == "normal"


def test_one_cpu_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "sched_setscheduler", _refuse)
    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    assert priority.raise_priority() == "nice"


@pytest.mark.parametrize("got", ["realtime", "nice", "normal"])
def test_what_the_operator_set_wins_over_defaults(got: priority.PriorityName) -> None:
    default = priority.choose_timing(got, ElectionSettings())
    assert default.timeout_ms >= 5 * default.heartbeat_ms
    chosen = priority.choose_timing(got, ElectionSettings(heartbeat_ms=7, timeout_ms=70))
    assert chosen == (7, 70, got)
