"""Faults without a cluster: whom a partition cuts, shifted clocks, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import chaos
from chaos.cli import main
from chaos.faults import clock
from chaos.faults.kinds import BadWire
from chaos.faults.network import both_ways
from chaos.faults.wire import Fate, Weather
from chaos.faults.world import World, parse_pids, unavailable
from chaos.scenario import FaultSpec
from idl.errors import ConfigError
from outrider.local.process import identity_of


@pytest.mark.parametrize(
    ("direction", "cuts"),
    [
        ("out", [("c1", "c2"), ("c1", "n1")]),
        ("in", [("c2", "c1"), ("n1", "c1")]),
        ("both", [("c1", "c2"), ("c1", "n1"), ("c2", "c1"), ("n1", "c1")]),
    ],
)
def test_a_partition_cuts_each_direction_apart(direction: str, cuts: list[tuple[str, str]]) -> None:
    assert both_ways(["c1"], ["c2", "n1"], direction) == cuts


def test_the_fate_of_frames_is_drawn_from_the_seed() -> None:
    def fates(seed: int) -> list[list[float]]:
        fate = Fate(Weather(delay_ms=40, jitter_ms=10, loss=0.2, duplication=0.1, seed=seed))
        return [fate.of_next() for _ in range(2_000)]

    assert fates(1) == fates(1) != fates(2)
    copies = [len(one) for one in fates(1)]
    assert 300 < copies.count(0) < 500 and 100 < copies.count(2) < 220
    assert all(30 <= late <= 50 for one in fates(1) for late in one)
    quiet = Fate(Weather(seed=1))
    assert [quiet.of_next() for _ in range(3)] == [[0.0]] * 3
    assert str(quiet.counts).startswith("3 frames sent, 0 lost, 0 doubled, 0 delayed")


@pytest.mark.parametrize(
    ("fault", "amount", "weather", "netem"),
    [
        ("delay", "80ms", Weather(delay_ms=80, jitter_ms=20), ("delay", "80ms", "20ms")),
        ("loss", "20%", Weather(loss=0.2), ("loss", "20.00%")),
        ("duplication", "7.5%", Weather(duplication=0.075), ("duplicate", "7.50%")),
    ],
)
def test_both_makers_of_a_bad_wire_are_told_the_same(
    tmp_path: Path, fault: str, amount: str, weather: Weather, netem: tuple[str, ...]
) -> None:
    spec = msgspec.convert({"fault": fault, "amount": amount}, FaultSpec)
    bad = BadWire(World(folder=tmp_path), spec, ("c1",), dice=0)
    assert (bad.weather, bad.netem) == (weather, netem)


def test_a_clock_jumps_and_jumps_back(tmp_path: Path) -> None:
    file = tmp_path / "clock"
    clock.write_offset(file, 0)
    time_ns = clock.shifted(file, lambda: 1_000_000_000)
    assert time_ns() == 1_000_000_000
    clock.write_offset(file, -250)
    assert time_ns() == 750_000_000
    clock.write_offset(file, 0)
    assert time_ns() == 1_000_000_000


def test_a_module_runs_on_a_shifted_clock(tmp_path: Path) -> None:
    """-10**12 ms: 31 years back, so any real clock of today reads below 2010 with it."""
    (tmp_path / "told.py").write_text(
        "import sys, time\nprint(sys.argv[1:], time.time() < 1.3e9, __name__)\n"
    )
    clock.write_offset(tmp_path / "clock", -(10**12))
    run = subprocess.run(
        [sys.executable, "-m", "chaos.faults.clock", str(tmp_path / "clock"),
         sys.executable, "-m", "told", "--x"],
        check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{Path(chaos.__file__).parents[1]}:{tmp_path}"},
    )  # fmt: skip
    assert run.stdout == "['--x'] True __main__\n"


def test_somebody_s_cluster_can_only_be_paused(tmp_path: Path) -> None:
    me = identity_of(os.getpid())
    assert me is not None
    world = World(folder=tmp_path, pids={"c1": me})
    assert unavailable(world, "pause") == ""
    assert "can be paused" in unavailable(world, "kill")
    assert "--pid" in unavailable(World(folder=tmp_path), "pause")


def test_pids_are_of_others_that_run() -> None:
    parent = os.getppid()
    assert parse_pids((f"c1={parent}",))["c1"].pid == parent
    for wrong in ("c1", "c1=", "=1", "c1=x", "c1=999999999", f"c1={os.getpid()}"):
        with pytest.raises(ConfigError, match="--pid"):
            parse_pids((wrong,))


def test_breaking_a_cluster_that_is_not_ours_needs_permission(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "--scenario", "kills", "--cluster", "some.json"]) == 2
    assert "--i-may-break-this-cluster" in capsys.readouterr().err
    assert main(["run", "--scenario", "kills", "--pid", "c1=1"]) == 2
    assert "--cluster" in capsys.readouterr().err


def test_the_embedded_broker_is_not_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("about: x\nnemesis: [{fault: broker_kill, target: broker}]\n")
    assert main(["run", "--scenario", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_scenarios_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios"]) == 0
    assert "partitions" in capsys.readouterr().out
