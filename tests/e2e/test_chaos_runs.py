"""The harness on real processes: kills and pauses on the loopback, partitions in namespaces."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from chaos.checkers import CHECKERS
from chaos.demo.leftovers import look
from chaos.faults import network
from chaos.faults.world import weather_unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
ROOT = Path(__file__).parents[2]

KILLS = """
about: test
generator: {rate: 4, mix: {quick: 5, work: 4, failing: 1, flaky: 1, cancelled: 1, large: 1,
            poisoned: 1, duplicate: 1}}
nemesis:
  - {fault: kill,  target: leader,  every: 8s,  lasts: 1s, first: 2s}
  - {fault: pause, target: leader,  every: 11s, lasts: 2s, first: 6s}
  - {fault: kill,  target: agent,   every: 10s, lasts: 1s, first: 4s}
  - {fault: pause, target: standby, every: 13s, lasts: 2s, first: 9s}
  - {fault: clock_jump, target: coordinator, every: 15s, lasts: 3s, amount: -20s}
"""

PARTITION = """
about: test
cluster: {network: namespaces}
generator: {rate: 3, mix: {quick: 4, work: 3, flaky: 1, large: 1}}
nemesis:
  - {fault: partition, target: leader, every: 60s, lasts: 4s, first: 2s}
  - {fault: partition, target: leader, every: 60s, lasts: 3s, first: 9s, direction: out}
  - {fault: partition, target: agent,  every: 60s, lasts: 5s, first: 14s}
  - {fault: loss,      target: agent,  every: 60s, lasts: 1s, first: 1s, amount: 10%}
"""

LOSSY = """
about: test
cluster: {network: namespaces}
generator: {rate: 3, mix: {quick: 4, work: 3, flaky: 1, large: 1, duplicate: 1}}
nemesis:
  - {fault: loss,        target: leader,  every: 60s, lasts: 6s, first: 2s,  amount: 20%}
  - {fault: duplication, target: agent,   every: 60s, lasts: 8s, first: 3s,  amount: 30%}
  - {fault: delay,       target: standby, every: 60s, lasts: 6s, first: 5s,  amount: 60ms}
  - {fault: delay,       target: leader,  every: 60s, lasts: 5s, first: 12s, amount: 40ms}
  - {fault: kill,        target: leader,  every: 60s, lasts: 1s, first: 14s}
  - {fault: loss,        target: broker,  every: 60s, lasts: 2s, first: 18s, amount: 5%}
"""

KAFKA_CUT = """
about: test
cluster: {network: namespaces}
generator: {rate: 3, mix: {quick: 4, work: 3}}
nemesis:
  - {fault: partition, target: leader, every: 60s, lasts: 16s, first: 13s, cut_off_from: broker}
"""


def start(scenario: str, minutes: float, folder: Path) -> "subprocess.Popen[str]":
    file = folder / "scenario.yaml"
    file.write_text(scenario)
    return subprocess.Popen(
        [sys.executable, "-m", "chaos.cli", "run", "--scenario", str(file), "--json",
         "--minutes", str(minutes), "--seed", "5", "--report", str(folder / "report")],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(scenario: str, minutes: float, folder: Path) -> dict[str, Any]:
    process = start(scenario, minutes, folder)
    out, said = process.communicate()
    assert process.returncode == 0, said[-6000:]
    report: dict[str, Any] = json.loads(out)
    assert report["outcome"] == "pass"
    assert {verdict["checker"] for verdict in report["verdicts"]} == set(CHECKERS)
    assert (folder / "report" / "history.jsonl").stat().st_size > 10_000
    ElementTree.parse(folder / "report" / "timeline.svg")
    return report


def figures(report: dict[str, Any], checker: str) -> dict[str, Any]:
    found: dict[str, Any] = next(v for v in report["verdicts"] if v["checker"] == checker)
    return dict(found["figures"])


def test_kills_and_pauses_on_the_loopback(tmp_path: Path) -> None:
    report = run(KILLS, 0.6, tmp_path)
    assert report["faults"].keys() == {"kill", "pause", "clock_jump"}
    assert figures(report, "terms")["terms"] >= 4
    account = figures(report, "account")
    assert account["jobs"] == account["acknowledged"] > 80
    assert figures(report, "decided")["rejected"] > 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_partitions_in_namespaces(tmp_path: Path) -> None:
    reason = network.unavailable()
    if reason:
        pytest.skip(reason)
    report = run(PARTITION, 0.35, tmp_path)
    assert report["faults"]["partition"] == 3
    assert figures(report, "terms")["terms"] >= 3
    assert report["means"]["loss"] in ("netem", "wire")
    assert not network.sweep()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_bad_wire_loses_no_job(tmp_path: Path) -> None:
    reason = network.unavailable() or weather_unavailable()
    if reason:
        pytest.skip(reason)
    report = run(LOSSY, 0.4, tmp_path)
    assert report["faults"] == {"loss": 2, "duplication": 1, "delay": 2, "kill": 1}
    assert report["means"].keys() == {"loss", "duplication", "delay"}
    if "wire" in report["means"].values():
        lines = (tmp_path / "report" / "history.jsonl").read_text().splitlines()
        counted = [told.get("detail", "") for told in map(json.loads, lines)
                   if told["t"] == "fault_healed"]  # fmt: skip
        for word in (" lost", " doubled", " delayed"):
            assert any(f"{word}," in told and f" 0{word}" not in told for told in counted), counted
    assert not network.sweep()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_leader_that_alone_is_cut_off_from_kafka_gives_way(tmp_path: Path) -> None:
    reason = network.unavailable()
    if reason:
        pytest.skip(reason)
    report = run(KAFKA_CUT, 0.55, tmp_path)
    found = figures(report, "terms")
    assert found["handed over, cut off from Kafka"] >= 1, "it does not wait for the cut to heal"
    assert not network.sweep()


def test_ctrl_c_heals_judges_and_leaves_nothing(tmp_path: Path) -> None:
    process = start(KILLS, 10, tmp_path)
    history = tmp_path / "report" / "history.jsonl"
    deadline = time.monotonic() + 60
    while not (history.exists() and b"fault_began" in history.read_bytes()):
        assert time.monotonic() < deadline, "no fault ever began"
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-6000:]
    assert json.loads(out)["interrupted"]
    assert not look(f"chaos-{process.pid}").processes
