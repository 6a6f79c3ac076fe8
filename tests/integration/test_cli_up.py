"""`outrider up` and `down` for real: broker, coordinators and agents as processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dataplane.broker import Broker
from idl.settings import ClusterSettings
from outrider.client.client import Client
from outrider.client.job import Job
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions, StartFailedError
from outrider.local.process import find_marked, identity_of

pytestmark = [pytest.mark.kafka, pytest.mark.slow]
WAIT_S = 60.0
EXAMPLES = Path(__file__).parents[2] / "examples"
Outrider = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _an_ordinary_user_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root no agent here can hold a group limit on memory or CPU, and says so."""
    if os.geteuid() != 0:
        monkeypatch.setenv("OUTRIDER_ALLOW_UNENFORCED", "memory,cpu")


@pytest.fixture
def outrider(tmp_path: Path) -> Iterator[Outrider]:
    """Runs the CLI in a state home of its own; whatever it started is stopped at the end."""
    env = {key: value for key, value in os.environ.items() if key != "OUTRIDER_CONFIG"}
    env["XDG_STATE_HOME"] = str(tmp_path)

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            (sys.executable, "-m", "outrider", *words), env=env, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip

    yield run
    run("down", "--purge")
    assert find_marked(f"{tmp_path}/") == []


def up(outrider: Outrider) -> Any:
    result = outrider("up", "--coordinators", "1", "--agents", "1", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_up_submit_wait_status_down(outrider: Outrider, tmp_path: Path) -> None:
    started = up(outrider)
    assert [one["role"] for one in started["processes"]] == ["broker", "coordinator", "agent"]
    again = outrider("up")
    assert again.returncode == 2
    assert "already up" in again.stderr
    hello = outrider("submit", "--wait", "--cpu", "100m", "--", "echo", "hello")
    assert (hello.returncode, hello.stdout) == (0, "hello\n"), hello.stderr
    failed = outrider("submit", "--wait", "--retries", "0", "--cpu", "100m", "--", "false")
    assert failed.returncode == 1
    batch = outrider("submit", "-f", str(EXAMPLES / "jobs.yaml"), "--wait")
    assert (batch.returncode, batch.stdout) == (0, "3 jobs: 3 finished\n"), batch.stderr
    assert outrider("result", "example-batch-sum").stdout == "6\n"
    assert json.loads(outrider("audit", "--json").stdout)["ended"] == 5
    done = outrider("down")
    assert (done.returncode, done.stdout) == (0, "stopped broker, c1, n1\n")
    assert outrider("down").returncode == 3
    assert (tmp_path / "outrider" / "local" / "cluster.json").exists()


def test_the_sdk_examples_run(outrider: Outrider, tmp_path: Path) -> None:
    up(outrider)
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "OUTRIDER_CONFIG": "",
           "PYTHONPATH": str(EXAMPLES.parent)}  # fmt: skip
    for name, last in (
        ("submit_sdk.py", "[0, 1, 4, 9, 16]"),
        ("submit_async.py", "10 of 10 finished"),
    ):
        made = subprocess.run((sys.executable, EXAMPLES / name), env=env, capture_output=True,
                              text=True, check=False, timeout=120)  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert made.stdout.splitlines()[-1] == last


def test_down_cleans_up_after_a_crashed_up(outrider: Outrider, tmp_path: Path) -> None:
    starting = subprocess.Popen(
        (sys.executable, "-m", "outrider", "up"), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    folder = tmp_path / "outrider" / "local"
    deadline = time.monotonic() + WAIT_S
    while not find_marked(f"{folder}:c1") and time.monotonic() < deadline:
        time.sleep(0.01)
    starting.kill()
    starting.wait()
    assert find_marked(f"{folder}:") != []
    result = outrider("down")
    assert result.returncode == 0, result.stderr
    assert find_marked(f"{folder}:") == []


def broken_secret(settings: ClusterSettings) -> ClusterSettings:
    return msgspec.structs.replace(settings, secret_file="/does/not/exist")


def test_a_failed_start_stops_everything_and_says_why(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(StartFailedError, match="/does/not/exist") as caught:
        LocalCluster.start(
            LocalOptions(folder=tmp_path / "c", coordinators=1, agents=1, tune=broken_secret),
            told.append,
        )
    assert caught.value.log
    assert told[-1] == "stopping the embedded broker"
    assert find_marked(f"{tmp_path}/") == []
    assert not (tmp_path / "c" / "run.json").exists()


def test_an_earlier_runs_leader_and_nodes_do_not_count_as_up(
    embedded_broker: Broker, tmp_path: Path
) -> None:
    """A durable ledger survives `down`; the next `up` waits for a leader of its own."""
    options = LocalOptions(
        folder=tmp_path / "c", coordinators=1, agents=1, kafka=embedded_broker.bootstrap,
        prefix="again.",
    )  # fmt: skip
    for term in (1, 2):
        with LocalCluster.start(options) as cluster:
            view = LedgerView(cluster.settings)
            view.advance()
            assert view.state.term >= term
            assert [record.role for record in cluster.processes] == ["coordinator", "agent"]
    assert embedded_broker.healthy()


def test_kill_and_restart_by_name(tmp_path: Path) -> None:
    options = LocalOptions(folder=tmp_path / "c", coordinators=1, agents=1)
    with LocalCluster.start(options) as cluster, Client(cluster.config_path) as client:
        handle = client.submit(Job(["sleep", "0.5"], cpu="100m"))
        cluster.kill("c1")
        assert not cluster.run.process("c1").alive
        restarted = cluster.restart("c1")
        assert restarted.alive
        assert handle.wait(WAIT_S).succeeded
        cluster.kill("n1", signal.SIGSTOP)
        broker = cluster.run.process("broker").identity
    assert broker is not None
    assert identity_of(broker.pid) != broker
    assert LocalCluster.attach(folder=tmp_path / "c") is None
