"""Crowded machines: whom a silence deposes there, and that quiet ones are as fast as ever."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core import events as e
from controlplane.core import silence
from controlplane.core.silence import MEMORY_MS, STRETCH_MAX, ElectionTiming, Silence
from tests.unit.election_net import TIMING, Net

CONFIGURED = TIMING.timeout_ms
WATCHED_MS = 60_000


class Crowded(Net):
    """A machine on which every member is off the CPU for `off_ms()` again and again: what comes
    for it meanwhile waits, its timers too."""

    def __init__(self, seed: int, off_ms: Callable[[random.Random], int]) -> None:
        self.off_ms, self.dice = off_ms, random.Random(f"crowded/{seed}")
        self.back_at: dict[str, int] = {}
        self.waiting: dict[str, list[e.ElectionEvent]] = {}
        super().__init__(3, seed)
        for name in list(self.live):
            self.after(self.dice.randint(0, 300), lambda name=name: self.take_away(name))  # type: ignore[misc]

    def take_away(self, name: str) -> None:
        off = self.off_ms(self.dice)
        self.back_at[name] = self.now + off
        self.after(off, lambda: self.give_back(name))

    def give_back(self, name: str) -> None:
        waited = self.waiting.pop(name, [])
        timers = [x for x in waited if isinstance(x, e.Tick)][-1:]  # asyncio: due timers first
        for event in [*timers, *(x for x in waited if not isinstance(x, e.Tick))]:
            super().step(name, event)
        self.after(self.dice.randint(20, 200), lambda: self.take_away(name))

    def step(self, name: str, event: e.ElectionEvent) -> None:
        if self.now < self.back_at.get(name, 0):
            self.waiting.setdefault(name, []).append(event)
        else:
            super().step(name, event)


def usually_short(dice: random.Random) -> int:
    """As measured at normal priority beside busy loops: mostly short, some past the timeout."""
    return dice.choice((50, 100, 200, 300, 700))


def changes(seed: int) -> int:
    net = Crowded(seed, usually_short).run(3_000)
    before = len(net.won)
    return len(net.run(WATCHED_MS).won) - before


def no_grace(self: Silence, now_ms: int) -> int:
    return 0


def test_a_crowded_machine_keeps_its_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = range(5)
    measured = [changes(seed) for seed in seeds]
    monkeypatch.setattr(silence, "STRETCH_MAX", 1)
    monkeypatch.setattr(Silence, "grace_ms", no_grace)
    without = [changes(seed) for seed in seeds]
    assert sum(measured) * 5 <= sum(without), (measured, without)


@pytest.mark.parametrize("seed", range(3))
def test_a_crowded_machine_still_replaces_a_leader_that_hangs(seed: int) -> None:
    net = Crowded(seed, usually_short).run(10_000)
    hung_at, hung = net.now, net.leaders[0]
    net.kill(hung, hint=False)
    net.run(3 * STRETCH_MAX * CONFIGURED)
    taken = [at for at, name, _ in net.won if at > hung_at and name != hung]
    assert taken, "patience is bounded"


def test_a_quiet_cluster_keeps_the_configured_timeout() -> None:
    net = Net(3).run(30_000)
    assert {x.timeout_ms for x in net.live.values()} == {CONFIGURED}
    assert not any(x.excuses for x in net.live.values())


signs = st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 5_000)), max_size=60)


@given(signs)
@settings(max_examples=200, deadline=None)
def test_the_timeout_stays_within_its_bounds_and_is_forgotten(steps: list[tuple[int, int]]) -> None:
    found, now = Silence(TIMING, 0), 0
    recent: list[tuple[int, int]] = []
    for pause, length in steps:
        now += pause
        found.heard(now, since_ms=now - length)
        recent.append((now, length))
        timeout = found.timeout_ms(now)
        assert CONFIGURED <= timeout <= STRETCH_MAX * CONFIGURED
        fresh = max(x for at, x in recent if now - at < MEMORY_MS)
        old = max(x for at, x in recent if now - at <= 2 * MEMORY_MS + 3_000)
        assert min(2 * fresh, STRETCH_MAX * CONFIGURED) <= timeout <= max(2 * old, CONFIGURED)
    assert found.timeout_ms(now + 2 * MEMORY_MS) == CONFIGURED


def test_silences_below_half_of_the_timeout_change_nothing() -> None:
    found = Silence(TIMING, 0)
    found.heard(1_000, since_ms=1_000 - CONFIGURED // 2)
    assert found.timeout_ms(1_000) == CONFIGURED
    found.heard(2_000, since_ms=2_000 - CONFIGURED // 2 - 1)
    assert found.timeout_ms(2_000) == CONFIGURED + 2


def test_a_grace_is_for_those_who_were_late_and_is_bounded() -> None:
    timing = ElectionTiming(heartbeat_ms=50, timeout_ms=500)
    found, now = Silence(timing, 0), 0
    found.wake_by(100)
    assert found.grace_ms(150) == 0, "a heartbeat late is in time"
    given = 0
    for _ in range(100):
        found.wake_by(now)
        now += 500
        given += found.grace_ms(now)
    assert given == STRETCH_MAX * timing.timeout_ms
    found.heard(now, since_ms=now)
    found.wake_by(now)
    assert found.grace_ms(now + 500) == 2 * timing.heartbeat_ms


def follower() -> tuple[Net, str]:
    net = Net(3).run(2_000)
    return net, next(name for name in net.live if name not in net.leaders)


def late_step(net: Net, name: str, event: e.ElectionEvent, late_ms: int) -> list[e.ElectionEffect]:
    return list(net.live[name].step(event, net.now + late_ms))


def test_a_follower_that_did_not_run_listens_before_it_stands() -> None:
    net, name = follower()
    late = 10 * CONFIGURED
    assert not [x for x in late_step(net, name, e.Tick(), late) if isinstance(x, e.SendBallot)]
    wakeup = net.live[name].next_wakeup_ms(net.now + late)
    assert wakeup == net.now + late + 2 * TIMING.heartbeat_ms
    effects = net.live[name].step(e.Tick(), wakeup)
    assert [x for x in effects if isinstance(x, e.SendBallot)], "and then it does"


def test_a_leader_that_did_not_run_asks_before_it_steps_down() -> None:
    net = Net(3).run(2_000)
    (leader,) = net.leaders
    effects = late_step(net, leader, e.Tick(), 2 * CONFIGURED)
    assert not [x for x in effects if isinstance(x, e.LoseRole)]
    renewals = [x.ballot for x in effects if isinstance(x, e.SendBallot)]
    assert [x.kind for x in renewals] == ["renew"]
    at = net.now + 2 * CONFIGURED + 2 * TIMING.heartbeat_ms
    net.live[leader].step(e.Tick(), at - TIMING.heartbeat_ms)
    (lost,) = [x for x in net.live[leader].step(e.Tick(), at) if isinstance(x, e.LoseRole)]
    assert "not renewed" in lost.reason


def test_a_hint_is_believed_by_those_who_were_late_too() -> None:
    net, name = follower()
    net.live[name].step(e.PeerGone(peer=net.leaders[0]), net.now)
    late = 2 * TIMING.heartbeat_ms
    assert [x for x in late_step(net, name, e.Tick(), late) if isinstance(x, e.SendBallot)]
