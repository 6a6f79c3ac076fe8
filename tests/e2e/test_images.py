"""Images over the whole path: configured, unpacked, reported, scheduled, seen by the job."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from idl.settings import ClusterSettings, NodeTiming
from outrider.client.client import Client
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.process import wait_gone
from tests.e2e.conftest import Cluster, answer_of, wait_until
from tests.images import Layout, layer_of_folder, tiny_root
from tests.unit.test_images_layers import files

pytestmark = pytest.mark.slow
WAIT_S = 60.0


def _patient(settings: ClusterSettings) -> ClusterSettings:
    """An agent that restarts needs its seconds, and is not lost meanwhile."""
    timing = NodeTiming(report_ms=500, heartbeat_ms=300, lost_ms=20_000, resend_ms=200)
    return replace(settings, nodes=timing)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("images")
    root = tiny_root(folder / "root")
    layout = Layout(folder / "layout")
    base = layer_of_folder(root)
    over = files(etc__release="tiny, changed\n")
    layout.tag(layout.image(base, over, env=("FROM=image", "OURS=image")))
    options = LocalOptions(
        name=f"e2e-{folder.name}", folder=folder / "cluster", tune=_patient, agents=1,
        coordinators=1,
        images=(f"tiny=oci:{layout.folder}", f"plain=dir:{root}", f"broken=oci:{root}"),
    )  # fmt: skip
    with LocalCluster.start(options) as local, Client(local.config_path) as client:
        yield Cluster(local, client)


def images(cluster: Cluster) -> dict[str, str]:
    return cluster.view().state.nodes["n1"].images


def test_jobs_run_in_images_and_wait_for_those_that_nobody_has(tiny: Cluster) -> None:
    wait_until(lambda: set(images(tiny)) == {"tiny", "plain"}, "images are offered", WAIT_S)
    assert images(tiny)["tiny"].startswith("sha256:") and images(tiny)["plain"] == "directory"
    (node,) = answer_of(tiny.local, "nodes", wait_s=WAIT_S)
    assert node["images"] == images(tiny)
    unknown = tiny.client.submit(tiny.job("true", image="unknown"))
    broken = tiny.client.submit(tiny.job("true", image="broken"))
    script = "cat /etc/release; echo $FROM $OURS; ls -d /home /etc/shadow 2>/dev/null; true"
    for image, words in (("tiny", b"tiny, changed\nimage job\n"), ("plain", b"tiny\njob\n")):
        handle = tiny.client.submit(tiny.sh(script, image=image, env={"OURS": "job"}))
        record = handle.attempt_result(WAIT_S)
        assert record is not None and record.exit_code == 0, record
        assert record.stdout_tail == words
    host = tiny.client.submit(tiny.sh("cat /etc/release || ls -d /usr"))
    record = host.attempt_result(WAIT_S)
    assert record is not None and record.stdout_tail == b"/usr\n"
    for handle, name in ((unknown, "unknown"), (broken, "broken")):
        why = answer_of(tiny.local, "why", handle.job, wait_s=WAIT_S)
        assert why["code"] == "NoMatchingNode"
        assert why["message"] == f"no node offers image {name}"


def test_a_restarted_agent_finds_its_images_again_and_runs_what_waited(tiny: Cluster) -> None:
    wait_until(lambda: "tiny" in images(tiny), "the image is offered", WAIT_S)
    store = tiny.local.place.state / "n1/images"
    (folder,) = store.iterdir()
    made_ns = folder.stat().st_mtime_ns
    tiny.local.restart("n1")
    handle = tiny.client.submit(tiny.sh("cat /etc/release", image="tiny"))
    record = handle.attempt_result(WAIT_S)
    assert record is not None and record.stdout_tail == b"tiny, changed\n"
    assert [one.name for one in store.iterdir()] == [folder.name]
    assert folder.stat().st_mtime_ns == made_ns, "unpacked again"


def test_an_image_added_while_a_job_runs_is_had_once_that_has_ended(
    tiny: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The launcher that the restarted agent adopts does not know it, and is replaced when idle."""
    wait_until(lambda: "tiny" in images(tiny), "the image is offered", WAIT_S)
    late = tiny_root(tmp_path_factory.mktemp("late") / "root")
    running = tiny.client.submit(tiny.sh("sleep 3; cat /etc/release", image="tiny"))
    wait_until(lambda: running.status().phase == "running", "the job runs", WAIT_S)
    waiting = tiny.client.submit(tiny.sh("cat /etc/release", image="late"))
    tiny.local.kill("n1", signal.SIGHUP)
    record = tiny.local.run.process("n1")
    assert record.identity is not None
    wait_gone(record.identity, WAIT_S)
    arguments = (*record.arguments, "--image", f"late=dir:{late}")
    tiny.local._record(tiny.local.run.having(replace(record, arguments=arguments)))
    tiny.local.restart("n1")
    for handle, words in ((running, b"tiny, changed\n"), (waiting, b"tiny\n")):
        result = handle.attempt_result(WAIT_S)
        assert result is not None and result.stdout_tail == words and result.attempt == 1
