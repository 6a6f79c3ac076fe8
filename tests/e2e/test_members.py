"""The membership on real processes: three coordinators become four and three again, while jobs run
and the leader is the one that goes; nobody else is restarted."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from benchmarks.failover import Load
from idl.ids import CoordinatorId
from idl.keys import new_private_key
from idl.members import CoordinatorPeer
from outrider.client.view import LedgerView
from outrider.local import machine
from outrider.local.cluster import LocalCluster, LocalOptions
from tests.e2e.conftest import answer_of, hand_over

pytestmark = pytest.mark.timeout(400)
WAIT_S = 60
JOBS = 2
"""Of the load one in forty runs a program: a busy machine ends one in two seconds."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    options = LocalOptions(name=f"members-{os.getpid()}", folder=tmp_path / "cluster")
    with LocalCluster.start(options) as local:
        load = Load(local.settings)
        try:
            yield local
        finally:
            load.close()


outrider = partial(answer_of, wait_s=WAIT_S)


class Fourth:
    """c4: its key, a cluster file that lists it, its process."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        settings, secret = cluster.settings, cluster.place.secret_file
        private, public = new_private_key()
        key = secret.with_name("c4.key")
        key.touch(mode=0o600)
        key.write_text(private)
        hint, self.metrics = machine.free_tcp_ports(2)
        self.peer = CoordinatorPeer(
            name=CoordinatorId("c4"), hint_port=hint, public_keys=(public,),
            dds_port=machine.coordinator_dds_port(settings.dds.domain, 7),
        )  # fmt: skip
        self.file = cluster.config_path.with_name("cluster-of-four.json")
        four = replace(settings, coordinators=(*settings.coordinators, self.peer))
        self.file.write_bytes(msgspec.json.encode(four))
        self.log = cluster.place.logs / "c4.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "controlplane.coordinator", "--config", str(self.file),
                 "--name", "c4", "--metrics-port", str(self.metrics)],
                stdout=log, stderr=log,
            )  # fmt: skip

    def waits_for(self) -> list[str] | None:
        """What /ready names; None before it answers."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.metrics}/ready", timeout=2
            ) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        except OSError:
            return None
        found: list[str] = json.loads(text)["waiting_for"]
        return found

    def order(self) -> list[str]:
        """The words that make it a member."""
        return [
            "members", "add", "c4", "--address", self.peer.address,
            "--dds-port", str(self.peer.dds_port), "--hint-port", str(self.peer.hint_port),
            "--public-key", *self.peer.public_keys,
        ]  # fmt: skip

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


@pytest.fixture
def fourth(cluster: LocalCluster) -> Iterator[Fourth]:
    found = Fourth(cluster)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.process.wait(10)


def leads(cluster: LocalCluster) -> tuple[str, int]:
    view = LedgerView(cluster.settings)
    view.advance()
    return view.leader, view.state.term


def finished(cluster: LocalCluster) -> int:
    view = LedgerView(cluster.settings)
    view.advance()
    return sum(queue.finished for queue in view.state.queues.values())


def test_three_become_four_and_three_again_without_a_restart(
    cluster: LocalCluster, fourth: Fourth
) -> None:
    pids = {r.name: r.identity for r in cluster.processes}
    first = outrider(cluster, "members")
    assert first["version"] == 0 and [m["name"] for m in first["members"]] == ["c1", "c2", "c3"]
    deadline = time.monotonic() + WAIT_S
    while fourth.waits_for() != []:
        assert time.monotonic() < deadline, fourth.log.read_text()[-3000:]
        time.sleep(0.2)

    four = outrider(cluster, *fourth.order())
    assert four["version"] == 1 and [m["name"] for m in four["members"]][-1] == "c4"
    assert "is a member already" in outrider(cluster, *fourth.order(), code=1)

    # It votes, it is called by nodes that never heard of it, and it can lead.
    hand_over(cluster.config_path, "c4", WAIT_S)
    assert leads(cluster)[0] == "c4"
    done = finished(cluster)
    deadline = time.monotonic() + WAIT_S
    while finished(cluster) < done + JOBS:
        assert time.monotonic() < deadline, "no job finishes under the new member"
        time.sleep(0.3)

    # The leader itself is removed: it hands over and says why; its process may go.
    three = outrider(cluster, "members", "remove", "c4")
    assert three["version"] == 2 and [m["name"] for m in three["members"]] == ["c1", "c2", "c3"]
    deadline = time.monotonic() + WAIT_S
    while leads(cluster)[0] == "c4":
        assert time.monotonic() < deadline, "the removed leader still leads"
        time.sleep(0.1)
    _, term = leads(cluster)
    ended = [one["ended"] for one in outrider(cluster, "leader")["terms"] if one["leader"] == "c4"]
    assert ended[-1] == "c4 stepped down: it was removed from the membership"
    assert any("is no member" in reason for reason in fourth.waits_for() or ())
    assert fourth.stop() == 0
    done = finished(cluster)
    deadline = time.monotonic() + WAIT_S
    while finished(cluster) < done + JOBS:
        assert time.monotonic() < deadline, "no job finishes after the removal"
        time.sleep(0.3)
    later = [one["ended"] for one in outrider(cluster, "leader")["terms"] if one["term"] >= term]
    assert not any("c4" in why for why in later), "an end of a stranger deposes nobody"
    assert {r.name: r.identity for r in cluster.processes} == pids
    assert all(record.alive for record in cluster.processes), "nobody was restarted"
    assert outrider(cluster, "audit")["ok"]
