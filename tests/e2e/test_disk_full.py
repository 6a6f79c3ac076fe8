"""The disk of an agent's state directory fills up: it takes nothing new, and loses nothing."""

import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from idl.settings import NodeTiming
from outrider.cli.cluster import node_document
from outrider.client.client import Client
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.process import is_alive
from tests.e2e.conftest import Cluster, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk"),
]
WAIT_S = 60.0
DISK_BYTES = 64 << 20


class Small(NamedTuple):
    cluster: Cluster
    disk: Path

    def fill(self) -> None:
        """To the last byte."""
        with (self.disk / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                return

    def empty(self) -> None:
        (self.disk / "ballast").unlink()

    def node(self) -> tuple[str, str]:
        """State and reason, as `outrider nodes` has them."""
        (node,) = self.cluster.view().state.nodes.values()
        document = node_document(node)
        return document["state"], document["reason"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "full", str(disk)], check=True
    )
    timing = NodeTiming(report_ms=300, heartbeat_ms=300, lost_ms=20_000, resend_ms=200)
    options = LocalOptions(
        name=f"full-{os.getpid()}", folder=tmp_path / "cluster", coordinators=1, agents=1,
        tune=lambda found: replace(found, nodes=timing, state_dir=str(disk)),
    )  # fmt: skip
    try:
        with LocalCluster.start(options) as local, Client(local.config_path) as client:
            yield Small(Cluster(local, client), disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


eventually = partial(wait_until, wait_s=WAIT_S)


def test_a_full_disk_drains_the_node_and_nothing_is_lost(small: Small, tmp_path: Path) -> None:
    cluster = small.cluster
    (node,) = cluster.view().state.nodes
    talks = cluster.client.submit(
        cluster.sh("echo first; sleep 4; echo second; printf done > $OUTRIDER_RESULT")
    )
    sleeps = cluster.client.submit(cluster.sh("sleep 12; printf late > $OUTRIDER_RESULT"))
    begun = {"running", "finished"}  # on a slow machine one may have ended
    eventually(lambda: {h.status().phase for h in (talks, sleeps)} <= begun, "they never ran")
    small.fill()
    eventually(lambda: small.node()[0] == "draining", "it took no notice")
    assert small.node()[1] == "its state directory's disk is full"
    waits = cluster.client.submit(cluster.sh("printf new > $OUTRIDER_RESULT"))
    assert talks.result(WAIT_S) == b"done", "what runs goes on, and its end is told"

    agent = cluster.local.run.process(node).identity
    assert agent is not None
    cluster.local.kill(node, signal.SIGKILL)
    eventually(lambda: not is_alive(agent), "the agent did not end")
    cluster.local.restart(node)  # on a disk without room for a byte
    assert sleeps.result(WAIT_S) == b"late"
    assert [a.outcome for a in sleeps.status().attempts] == ["succeeded"]
    assert small.node()[0] == "draining" and waits.status().phase == "pending"

    small.empty()
    assert waits.result(WAIT_S) == b"new"
    assert len(waits.status().attempts) == 1
    assert small.node() == ("ready", "")
