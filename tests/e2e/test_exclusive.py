"""Exclusive jobs on real processes: the old attempt is dead before the next one begins."""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from dataplane.core.explain import explain
from dataplane.ledger import read_ledger
from dataplane.process import now_ms
from idl.ledger import Released
from idl.settings import NodeTiming
from outrider.client.client import Client, Handle
from outrider.local.cluster import LocalCluster, LocalOptions
from tests.e2e.conftest import Cluster, wait_until

pytestmark = pytest.mark.slow
WAIT_S = 90.0
LEASE_MS = 6_000
LOST_MS = 3_000
"""Shorter than the lease: what waits for it is seen to wait."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    timing = NodeTiming(
        report_ms=500, heartbeat_ms=300, lost_ms=LOST_MS, resend_ms=200,
        exclusive_lease_ms=LEASE_MS,
    )  # fmt: skip
    options = LocalOptions(
        name=f"e2e-{folder.name}", folder=folder, tune=lambda found: replace(found, nodes=timing)
    )
    with LocalCluster.start(options) as local, Client(local.config_path) as client:
        yield Cluster(local, client)


eventually = partial(wait_until, wait_s=WAIT_S)


def begun(cluster: Cluster, mark: str) -> tuple[Handle, str]:
    """An exclusive job whose first attempt runs for ever and whose second ends at once."""
    script = f"[ $OUTRIDER_ATTEMPT = 1 ] || exit 0; trap '' TERM; while :; do sleep {mark}; done"
    handle = cluster.client.submit(cluster.sh(script, exclusive=True, timeout="10m"))
    eventually(lambda: handle.status().phase == "running", "the job never ran")
    return handle, handle.status().node


def alive(mark: str) -> list[int]:
    """Processes of the job, wherever they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if f"sleep\0{mark}\0".encode() in words:
            found.append(int(path.parent.name))
    return found


def released_ms(cluster: Cluster, job: str) -> int:
    """When the leader gave attempt 1 up for good (epoch ms of this machine); 0: not yet."""
    kafka, pool = cluster.local.settings.kafka, cluster.local.settings.pool
    for _, entry in read_ledger(kafka, pool):
        for decision in entry.decisions:
            if isinstance(decision, Released) and (decision.job, decision.attempt) == (job, 1):
                return entry.at_ms
    return 0


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_the_first_attempt_is_dead_before_the_second_begins(
    cluster: Cluster, fault: signal.Signals
) -> None:
    """The agent is stopped or killed, so it can do nothing: the launcher alone ends the job."""
    mark = f"31.{int(fault)}"
    handle, node = begun(cluster, mark)
    eventually(lambda: bool(alive(mark)), "the shell starts no sleep")
    cluster.local.kill(node, fault)
    silent_ms = alive_ms = now_ms()
    told = ""
    try:
        while not released_ms(cluster, handle.job):
            looked_ms = now_ms()
            if alive(mark):
                alive_ms = looked_ms
            found = explain(cluster.view().state, handle.job, now_ms())
            told = found.message if found.code == "LeaseNotOver" else told
            assert now_ms() < silent_ms + WAIT_S * 1000
        assert alive(mark) == []
        assert alive_ms < released_ms(cluster, handle.job)
        assert node in told and "exclusive" in told
        end = handle.wait(WAIT_S)
    finally:
        if fault is signal.SIGSTOP:
            cluster.local.kill(node, signal.SIGCONT)
        else:
            cluster.local.restart(node)
    assert [a.outcome for a in end.attempts] == ["node_lost", "succeeded"]
    state = cluster.view().state
    state.check_invariants()
    eventually(lambda: not cluster.view().state.nodes[node].lost, "the node did not come back")


def test_a_renewed_lease_outlives_its_length(cluster: Cluster) -> None:
    job = cluster.sh(f"sleep {2 * LEASE_MS // 1000}", exclusive=True)
    end = cluster.client.submit(job).wait(WAIT_S)
    assert [a.outcome for a in end.attempts] == ["succeeded"]
