"""Agents and launchers that die under running jobs: what survives, what is retried."""

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from idl.settings import NodeTiming
from outrider.client.client import Client, Handle
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.process import MARK_VARIABLE, find_marked, is_alive
from tests.e2e.conftest import Cluster, wait_until

pytestmark = pytest.mark.slow
WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As everywhere, but patient: on a busy machine an agent needs its seconds to come back."""
    folder = tmp_path_factory.mktemp("cluster")
    timing = NodeTiming(report_ms=500, heartbeat_ms=300, lost_ms=20_000, resend_ms=200)
    options = LocalOptions(
        name=f"e2e-{folder.name}", folder=folder, tune=lambda found: replace(found, nodes=timing)
    )
    with LocalCluster.start(options) as local, Client(local.config_path) as client:
        yield Cluster(local, client)


eventually = partial(wait_until, wait_s=WAIT_S)


def launcher_of(cluster: Cluster, node: str) -> int:
    """The launcher of this node: by its mark and its program, as `down` finds it."""
    found = [
        process.pid
        for process in find_marked(f"{cluster.local.place.mark}{node}")
        if b"node_agent.launcher" in command_line(process.pid)
    ]
    return min(found, default=0)  # inits of jobs are its copies, and younger


def command_line(pid: int) -> bytes:
    """Empty where the process has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def sleeping(seconds: str) -> list[int]:
    """Processes that are `sleep SECONDS`, of whatever job."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if f"sleep\0{seconds}\0".encode() in command_line(pid)]


def metric(cluster: Cluster, node: str, name: str) -> float:
    port = cluster.local.run.process(node).metrics_port
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return -1.0
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def begun(cluster: Cluster, script: str, **more: object) -> tuple[Handle, str]:
    """A job whose program runs and has written its first line, and its node."""
    handle = cluster.client.submit(cluster.sh(script, **more))
    eventually(lambda: handle.status().phase == "running", "the job never ran")
    return handle, handle.status().node


def written(handle: Handle) -> dict[str, bytes]:
    """All output, by stream."""
    found: dict[str, bytes] = {}
    for chunk in handle.logs():
        found[chunk.stream] = found.get(chunk.stream, b"") + chunk.data
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_job_survives_its_agent(cluster: Cluster, number: signal.Signals) -> None:
    handle, node = begun(
        cluster,
        "echo first; echo oops >&2; sleep 3; echo second; sleep 1.5; echo third; "
        "printf done > $OUTRIDER_RESULT",
    )
    launcher = launcher_of(cluster, node)
    identity = cluster.local.run.process(node).identity
    assert launcher and identity
    cluster.local.kill(node, number)
    eventually(lambda: not is_alive(identity), "the agent did not end")
    assert launcher_of(cluster, node) == launcher
    time.sleep(2.5)  # it writes while nobody reads
    cluster.local.restart(node)
    assert handle.result(WAIT_S) == b"done"
    status = handle.status()
    assert [a.outcome for a in status.attempts] == ["succeeded"]
    assert written(handle) == {"stdout": b"first\nsecond\nthird\n", "stderr": b"oops\n"}
    result = handle.attempt_result(WAIT_S)
    assert result is not None
    assert (result.stdout_tail, result.stdout_bytes) == (b"first\nsecond\nthird\n", 19)
    assert result.usage.wall_ms >= 4_500
    assert metric(cluster, node, "outrider_attempts_adopted_total") == 1
    assert metric(cluster, node, "outrider_journal_bytes") > 0


def test_a_job_that_fails_without_an_agent_keeps_its_exit_code(cluster: Cluster) -> None:
    handle, node = begun(cluster, "sleep 2.17; echo bye; exit 7", retries=0)
    cluster.local.kill(node)
    eventually(lambda: not sleeping("2.17"), "it does not end while nobody is there")
    cluster.local.restart(node)
    attempts = handle.wait(WAIT_S).attempts
    assert [(a.outcome, a.exit_code) for a in attempts] == [("failed", 7)]
    assert written(handle) == {"stdout": b"bye\n"}


def test_a_dead_launcher_is_replaced_and_its_job_retried(cluster: Cluster) -> None:
    handle, node = begun(
        cluster,
        "[ $OUTRIDER_ATTEMPT = 1 ] && sleep 600; printf $OUTRIDER_ATTEMPT > $OUTRIDER_RESULT",
    )
    agent = cluster.local.run.process(node).identity
    os.kill(launcher_of(cluster, node), signal.SIGKILL)
    assert handle.result(WAIT_S) == b"2"
    assert handle.status().attempts[0].outcome == "platform"
    eventually(
        lambda: metric(cluster, node, "outrider_launcher_restarts_total") == 1, "not restarted"
    )
    assert agent is not None and is_alive(agent)
    jobs = [cluster.client.submit(cluster.sh("true")) for _ in range(4)]
    assert [job.result(WAIT_S) for job in jobs] == [b""] * 4


def test_a_wiped_state_directory_is_a_new_incarnation(cluster: Cluster) -> None:
    handle, node = begun(
        cluster,
        "[ $OUTRIDER_ATTEMPT = 1 ] && sleep 600; printf $OUTRIDER_ATTEMPT > $OUTRIDER_RESULT",
    )
    before = cluster.view().state.nodes[node].incarnation
    cluster.local.kill(node)
    (cluster.local.place.state / node / "journal").unlink()
    cluster.local.restart(node)
    assert handle.result(WAIT_S) == b"2"
    assert cluster.view().state.nodes[node].incarnation > before
    assert handle.status().attempts[0].outcome == "node_lost"


def test_stopping_the_cluster_ends_launchers_that_lost_their_agent(cluster: Cluster) -> None:
    """Last: nothing works here afterwards."""
    _, node = begun(cluster, "trap '' TERM; sleep 4247")
    cluster.local.kill(node)
    assert launcher_of(cluster, node)
    cluster.local.stop()
    assert find_marked(cluster.local.place.mark) == []
    assert sleeping("4247") == []
    assert MARK_VARIABLE == "OUTRIDER_LOCAL_PROCESS", "the launcher's environment names it"
