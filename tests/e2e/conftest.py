"""A real local cluster per module: broker, coordinators, two agents, as processes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

from idl.jobs import LimitName
from idl.settings import ClusterSettings, NodeTiming
from outrider.client.client import Client
from outrider.client.job import ALL_LIMITS, Job
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions
from tests.patience import FACTOR, patient

COORDINATORS: Final = 3 if FACTOR == 1 else 1
"""Three do not leave an emulated guest enough of its CPUs: their beacons alone take more, at
real-time priority, and the broker answers nobody in time."""


def _quick(settings: ClusterSettings) -> ClusterSettings:
    """Short silences, so that a lost node is not waited for long; a busy one is no lost one."""
    timing = NodeTiming(report_ms=500, heartbeat_ms=300, lost_ms=patient(8_000), resend_ms=200)
    return replace(settings, nodes=timing)


class Cluster:
    """A running cluster, a client of it, and the ledger as anybody may read it."""

    def __init__(self, local: LocalCluster, client: Client) -> None:
        self.local = local
        self.client = client

    def view(self) -> LedgerView:
        """The ledger up to its present end."""
        view = LedgerView(self.local.settings)
        view.advance()
        return view

    def unenforced(self) -> tuple[LimitName, ...]:
        """Limits that the nodes here cannot hold (without root): jobs do without them."""
        held = {name for node in self.view().state.nodes.values() for name in node.enforces}
        return tuple(name for name in ALL_LIMITS if name not in held)

    def job(self, *command: str, **more: object) -> Job:
        """A small job that these nodes can hold."""
        options = {"cpu": "200m", "memory": "64Mi", "timeout": f"{patient(30)}s",
                   "backoff": "100ms", "allow_unenforced": self.unenforced(), **more}  # fmt: skip
        return Job(command, **options)  # type: ignore[arg-type] # a table of keyword arguments

    def sh(self, script: str, **more: object) -> Job:
        """A shell one-liner."""
        return self.job("/bin/sh", "-c", script, **more)


def wait_until(condition: Callable[[], bool], what: str, wait_s: float) -> None:
    """Returns once it holds; fails with `what` where it does not within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def answer_of(cluster: LocalCluster, *words: str, code: int = 0, wait_s: float) -> Any:
    """A command's JSON answer, or its stderr where it has to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "outrider.cli.main", *words, "--json",
         "--config", str(cluster.config_path)],
        capture_output=True, text=True, check=False, timeout=wait_s,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if not code else done.stderr


def hand_over(config: Path, to: str, wait_s: float) -> dict[str, Any]:
    """`leader transfer`, ordered again where another one was elected, as it may be on a machine
    that lets the successor wait. Its answer; {} where `to` led by then."""
    command = [sys.executable, "-m", "outrider.cli.main", "leader", "transfer", "--json",
               "--config", str(config), "--to", to]  # fmt: skip
    deadline = time.monotonic() + wait_s
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=wait_s)
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
        if "leads already" in done.stderr:
            return {}
        assert "was elected instead" in done.stderr and time.monotonic() < deadline, done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    options = LocalOptions(
        name=f"e2e-{folder.name}", folder=folder, coordinators=COORDINATORS, tune=_quick,
        ready_timeout_s=patient(60),
    )  # fmt: skip
    with LocalCluster.start(options) as local, Client(local.config_path) as client:
        yield Cluster(local, client)
