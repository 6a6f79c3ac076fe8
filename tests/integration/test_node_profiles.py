"""Simulated machines and this one in one cluster: placed by topology, marked, and given nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.client.client import Client
from outrider.client.job import Job
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions
from tests.e2e.conftest import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patched:
        if os.geteuid() != 0:
            patched.setenv("OUTRIDER_ALLOW_UNENFORCED", "memory,cpu,cpu_time,io")
        options = LocalOptions(
            folder=tmp_path_factory.mktemp("profiles"), coordinators=1, agents=2,
            node_profiles=("v100-cube-mesh", "real"),
        )  # fmt: skip
        with LocalCluster.start(options) as started:
            yield started


def run(cluster: LocalCluster, job: Job) -> str:
    with Client(cluster.settings) as client:
        handle = client.submit(job)
        handle.wait(WAIT_S)
        return b"".join(chunk.data for chunk in handle.logs()).decode()


def outrider(cluster: LocalCluster, *words: str) -> str:
    answer = subprocess.run(
        (sys.executable, "-m", "outrider", *words, "--config", str(cluster.config_path)),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_gpus_of_a_simulated_machine_are_given_by_links_and_there_is_no_device(
    cluster: LocalCluster,
) -> None:
    script = "env | grep -E '^(CUDA|OUTRIDER_SIM)'; ls /dev | grep -c nvidia; true"
    said = run(
        cluster,
        Job(("sh", "-c", script), id="two", gpus=2, gpu_links="nvlink", cpu=4, cpu_pinning="cores"),
    )
    view = LedgerView(cluster.settings)
    view.advance()
    node = view.state.nodes["n1"]
    uuids = [gpu.uuid for gpu in node.topology.gpus]
    told = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    given = [uuids.index(uuid) for uuid in told["OUTRIDER_SIMULATED_GPUS"].split(",")]
    assert node.topology.nvlinks[given[0]][given[1]] == 2
    assert {node.topology.gpus[at].numa_node for at in given} in ({0}, {1})
    assert told["CUDA_VISIBLE_DEVICES"] == "" and said.splitlines()[-1] == "0"


def test_simulated_is_said_wherever_the_node_is_shown(cluster: LocalCluster) -> None:
    told = outrider(cluster, "nodes")
    assert ["simulated" in line for line in told.splitlines() if line.startswith("n")] == [
        True, False,
    ]  # fmt: skip
    assert "simulated" in outrider(cluster, "status")
    assert "simulated" in outrider(cluster, "events")
    assert "plays v100-cube-mesh, jobs get no device" in outrider(
        cluster, "nodes", "n1", "--topology"
    )
    documents = json.loads(outrider(cluster, "nodes", "--json"))
    assert [one["simulated"] for one in documents] == [True, False]


def test_why_names_the_constraint_on_every_node(cluster: LocalCluster) -> None:
    with Client(cluster.settings) as client:
        handle = client.submit(Job(("true",), id="never", gpus=1, gpu_model="H100"))
        wait_until(lambda: bool(handle.status().phase), "it is not ingested", WAIT_S)
        told = json.loads(outrider(cluster, "why", "never", "--json"))
        client.cancel("never")
    reasons = {one["node"]: one["why"] for one in told["nodes"]}
    assert reasons["n1 (simulated v100-cube-mesh)"] == "does not offer 1 GPUs of model 'h100'"
    assert reasons["n2"] == "does not offer 1 GPUs"


def test_the_picture_is_a_picture(cluster: LocalCluster, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    file = tmp_path / "n1.svg"
    outrider(cluster, "nodes", "n1", "--svg", str(file))
    root = ElementTree.parse(file).getroot()
    kinds = [one.get("class") for one in root.iter()]
    assert kinds.count("gpu") + kinds.count("held") == 8
    assert kinds.count("domain") == 2 and kinds.count("nic") == 1
    assert kinds.count("link") == 16, "pairs of the mesh with a link"
    assert kinds.count("core") + kinds.count("pinned") == 48


def test_an_unknown_profile_is_one_line(tmp_path: Path) -> None:
    from outrider.local.cluster import StartFailedError

    options = LocalOptions(
        name="bad", folder=tmp_path, coordinators=1, agents=1, node_profiles=("dgx-a10",)
    )
    with pytest.raises(StartFailedError, match="did you mean 'dgx-a100'"):
        LocalCluster.start(options)
