"""The nemesis at work on a fake cluster, tick by tick: what it breaks it heals, and what dies of
itself it tells and starts again."""

import errno
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from chaos.breaker import Breaker
from chaos.faults.kinds import KINDS
from chaos.faults.world import World
from chaos.history import FaultBegan, FaultHealed, FaultSkipped, ProcessEnded, Recorder, of
from chaos.nemesis import PlannedFault
from chaos.scenario import FaultSpec
from idl.errors import ConfigError, PlatformFaultError


class FakeRecord:
    def __init__(self, name: str) -> None:
        self.log = f"/no/such/{name}.log"
        self.alive = True


class FakeCluster:
    """What of LocalCluster the faults use; remembers what was done to whom."""

    def __init__(self, *names: str) -> None:
        self.records = {name: FakeRecord(name) for name in names}
        self.done: list[str] = []
        self.run = self
        self.stuck: set[str] = set()

    def process(self, name: str) -> FakeRecord:
        return self.records[name]

    def kill(self, name: str, number: signal.Signals) -> None:
        if not self.records[name].alive:
            raise ConfigError(f"process {name!r} is not running")
        self.done.append(f"{number.name} {name}")
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.records[name].alive = False

    def restart(self, name: str) -> None:
        if name in self.stuck:
            raise OSError(errno.EAGAIN, "cannot fork")
        self.done.append(f"restart {name}")
        self.records[name].alive = True


class Setting:
    def __init__(self, folder: Path) -> None:
        self.cluster = FakeCluster("c1", "c2", "c3", "n1")
        self.leader = "c2"
        self.world = World(
            folder=folder, coordinators=("c1", "c2", "c3"), agents=("n1",),
            cluster=cast(Any, self.cluster), leader=lambda: self.leader,
        )  # fmt: skip
        self.recorder = Recorder(folder / "h.jsonl", lambda: 0.0)
        self.breaker = Breaker(self.world, self.recorder)

    def told(self, kind: Any) -> list[Any]:
        return of(kind, self.recorder.history())


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def planned(number: int, at_s: float, lasts_s: float, **spec: Any) -> PlannedFault:
    return PlannedFault(number=number, at_s=at_s, lasts_s=lasts_s, spec=FaultSpec(**spec), dice=1)


def test_a_fault_begins_and_is_healed_when_due(setting: Setting) -> None:
    todo = [planned(1, 1.0, 2.0, fault="kill", target="leader")]
    setting.breaker.tick(todo, 0.9)
    assert setting.cluster.done == []
    setting.breaker.tick(todo, 1.0)
    assert setting.cluster.done == ["SIGKILL c2"]
    assert setting.breaker.open == ["kill c2"]
    setting.breaker.tick(todo, 2.9)
    assert setting.cluster.done == ["SIGKILL c2"], "a killed process is no crash"
    setting.breaker.tick(todo, 3.0)
    assert setting.cluster.done == ["SIGKILL c2", "restart c2"]
    began = setting.told(FaultBegan)
    assert [(one.targets, one.hit_leader) for one in began] == [(("c2",), True)]
    assert [one.fault for one in setting.told(FaultHealed)] == [1]
    assert not setting.told(ProcessEnded)


def test_at_the_end_everything_is_healed(setting: Setting) -> None:
    todo = [
        planned(1, 0, 99, fault="pause", target="agents"),
        planned(2, 0, 99, fault="stop", target="coordinators"),
    ]
    setting.breaker.tick(todo, 0)
    setting.breaker.heal_all()
    setting.breaker.heal_all()
    assert setting.cluster.done.count("SIGCONT n1") == 1
    assert [x for x in setting.cluster.done if x.startswith("restart")] == [
        "restart c1", "restart c2", "restart c3",
    ]  # fmt: skip
    assert setting.breaker.open == []


def test_what_ends_by_itself_is_told_and_started_again(setting: Setting) -> None:
    setting.cluster.records["c3"].alive = False
    setting.breaker.tick([], 0)
    assert [one.process for one in setting.told(ProcessEnded)] == ["c3"]
    assert setting.cluster.done == ["restart c3"]


def test_one_process_has_one_fault_of_a_group_at_a_time(setting: Setting) -> None:
    todo = [
        planned(1, 0, 9, fault="pause", target="leader"),
        planned(2, 0, 9, fault="kill", target="leader"),
    ]
    setting.breaker.tick(todo, 0)
    assert setting.cluster.done == ["SIGSTOP c2"]
    assert "under another fault" in setting.told(FaultSkipped)[0].reason


def test_what_cannot_be_done_here_is_skipped_with_its_reason_once(setting: Setting) -> None:
    todo = [planned(n, 0, 9, fault="disk_full", target="agents") for n in (1, 2)]
    setting.breaker.tick(todo, 0)
    assert [one.kind for one in setting.told(FaultSkipped)] == ["disk_full"]
    assert setting.breaker.skipped == 2
    assert not setting.told(FaultBegan)


class Unlucky:
    """A fault whose begin or heal raises."""

    means = ""

    def __init__(self, begin: Exception | None = None, heal: Exception | None = None) -> None:
        self.raised = (begin, heal)

    def begin(self) -> str:
        if self.raised[0] is not None:
            raise self.raised[0]
        return ""

    def heal(self) -> str:
        if self.raised[1] is not None:
            raise self.raised[1]
        return ""


def unlucky(monkeypatch: pytest.MonkeyPatch, kind: str, **raised: Exception) -> None:
    monkeypatch.setitem(KINDS, kind, lambda *_: Unlucky(**raised))


def test_a_healing_that_fails_keeps_no_other_from_its_own(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlucky(monkeypatch, "clock_jump", heal=PlatformFaultError("a wire ended by itself"))
    todo = [
        planned(1, 0, 9, fault="clock_jump", target="leader"),
        planned(2, 0, 9, fault="pause", target="agents"),
    ]
    setting.breaker.tick(todo, 0)
    setting.breaker.heal_all()
    assert setting.cluster.done == ["SIGSTOP n1", "SIGCONT n1"]
    assert setting.breaker.open == []
    bad, good = setting.told(FaultHealed)
    assert (bad.fault, bad.error) == (1, "clock_jump of c2: a wire ended by itself")
    assert (good.fault, good.error) == (2, "")
    assert setting.breaker.unhealed == [bad.error]


def test_a_fault_that_cannot_begin_for_want_of_room_is_skipped(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room = OSError(errno.ENOSPC, "No space left on device")
    unlucky(monkeypatch, "clock_jump", begin=no_room)
    setting.breaker.tick([planned(1, 0, 9, fault="clock_jump", target="leader")], 0)
    assert "No space left" in setting.told(FaultSkipped)[0].reason
    assert (setting.breaker.open, setting.told(FaultHealed)) == ([], [])
    unlucky(monkeypatch, "clock_jump", begin=no_room, heal=no_room)
    setting.breaker.tick([planned(2, 0, 9, fault="clock_jump", target="leader")], 0)
    assert [one.fault for one in setting.told(FaultHealed)] == [2]
    assert setting.breaker.open == []


def test_what_a_healing_could_not_start_is_no_crash_and_is_tried_again(setting: Setting) -> None:
    setting.breaker.tick([planned(1, 0, 1, fault="kill", target="coordinators")], 0)
    setting.cluster.stuck = {"c1"}
    setting.breaker.tick([], 1)
    assert not setting.cluster.records["c1"].alive
    assert setting.cluster.records["c2"].alive and setting.cluster.records["c3"].alive
    setting.cluster.stuck = set()
    setting.breaker.tick([], 1)
    assert setting.cluster.records["c1"].alive
    assert not setting.told(ProcessEnded)
    setting.breaker.look()
    setting.cluster.records["c1"].alive = False
    setting.breaker.look()
    assert [one.process for one in setting.told(ProcessEnded)] == ["c1"], "a crash afterwards is"


def test_what_cannot_be_started_again_is_told_once(setting: Setting) -> None:
    setting.cluster.stuck = {"c3"}
    setting.cluster.records["c3"].alive = False
    for _ in range(3):
        setting.breaker.look()
    assert [one.process for one in setting.told(ProcessEnded)] == ["c3"]


def test_clocks_jump_back(setting: Setting) -> None:
    setting.world.skewed = True
    file = setting.world.clock_file("n1")
    todo = [planned(1, 0, 1, fault="clock_jump", target="agent", amount="-2s")]
    setting.breaker.tick(todo, 0)
    assert int.from_bytes(file.read_bytes(), "little", signed=True) == -2_000_000_000
    setting.breaker.tick(todo, 1)
    assert int.from_bytes(file.read_bytes(), "little", signed=True) == 0
