"""Whole path, real processes, real faults: killed, paused, forged, asked to stop."""

import asyncio
import json
import signal
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from idl.control import AssignIntent, Intent
from idl.dds import topics
from idl.dds.link import ControlLink
from idl.errors import PlatformFaultError
from idl.ids import Incarnation
from idl.jobs import JobSpec
from outrider.local.process import is_alive
from tests.e2e.conftest import Cluster, wait_until

pytestmark = pytest.mark.slow
WAIT_S = 60.0


eventually = partial(wait_until, wait_s=WAIT_S)


def get(cluster: Cluster, process: str, path: str) -> str:
    port = cluster.local.run.process(process).metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def test_every_process_serves_metrics_and_readiness(cluster: Cluster) -> None:
    for record in cluster.local.processes:
        if record.role == "broker":
            continue
        assert json.loads(get(cluster, record.name, "/ready"))["ready"]
        assert "outrider_control_messages_refused" in get(cluster, record.name, "/metrics")


def test_logs_are_structured_lines(cluster: Cluster) -> None:
    for record in cluster.local.processes:
        if record.role != "broker":
            lines = Path(record.log).read_text().splitlines()
            assert lines
            assert all(json.loads(line)["process"] == record.name for line in lines)


def test_a_killed_leader_is_replaced_and_running_jobs_go_on(cluster: Cluster) -> None:
    handle = cluster.client.submit(cluster.sh("sleep 3; printf done > $OUTRIDER_RESULT"))
    eventually(lambda: handle.status().phase == "running", "the job never ran")
    old = cluster.view().leader
    cluster.local.kill(old, signal.SIGKILL)
    assert handle.result(WAIT_S) == b"done"
    assert len(handle.status().attempts) == 1, "the job must not have been started again"
    assert cluster.view().leader != old
    cluster.local.restart(old)
    eventually(lambda: '"ready": true' in get_or_empty(cluster, old), "it never came back")


def get_or_empty(cluster: Cluster, process: str) -> str:
    try:
        return get(cluster, process, "/ready")
    except OSError:
        return ""


def test_a_paused_leader_is_replaced_and_what_it_writes_later_is_void(cluster: Cluster) -> None:
    view = cluster.view()
    old, term = view.leader, view.state.term
    cluster.local.kill(old, signal.SIGSTOP)
    try:
        eventually(lambda: cluster.view().leader != old, "nobody took over")
        assert cluster.client.submit(cluster.sh("true")).result(WAIT_S) == b""
    finally:
        cluster.local.kill(old, signal.SIGCONT)
    assert cluster.client.submit(cluster.sh("true")).result(WAIT_S) == b""
    later = [one.leader for one in cluster.view().state.terms if one.term > term]
    assert later and later[0] != old, "it leads no more, or in a new term"


def test_sigterm_hands_the_role_over(cluster: Cluster) -> None:
    old = cluster.view().leader
    record = cluster.local.run.process(old)
    cluster.local.kill(old, signal.SIGTERM)
    eventually(lambda: cluster.view().leader != old, "nobody took over")
    identity = record.identity
    assert identity is not None
    eventually(lambda: not is_alive(identity), "it did not stop")
    cluster.local.restart(old)
    assert cluster.client.submit(cluster.sh("true")).result(WAIT_S) == b""


def test_a_lost_node_s_job_runs_elsewhere(cluster: Cluster) -> None:
    handle = cluster.client.submit(
        cluster.sh(
            "[ $OUTRIDER_ATTEMPT = 1 ] && sleep 600; printf $OUTRIDER_NODE > $OUTRIDER_RESULT"
        )
    )
    eventually(lambda: handle.status().phase == "running", "the job never ran")
    node = handle.status().node
    cluster.local.kill(node, signal.SIGKILL)
    assert handle.result(WAIT_S).decode() != node
    assert [a.outcome for a in handle.status().attempts][:1] == ["node_lost"]
    cluster.local.restart(node)
    eventually(lambda: '"ready": true' in get_or_empty(cluster, node), "it never came back")


async def standing_in(make: Callable[[], ControlLink]) -> ControlLink:
    """A link on the port of a process that was killed: the kernel may take a moment to free it."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return make()
        except PlatformFaultError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def test_forged_intents_run_nothing_and_are_counted(cluster: Cluster, tmp_path: Path) -> None:
    secret = tmp_path / "other-secret"
    secret.write_text("ee" * 32)
    secret.chmod(0o600)
    settings = replace(cluster.local.settings, secret_file=str(secret))
    node = next(p.name for p in cluster.local.processes if p.role == "agent")
    intent = Intent(
        pool=settings.pool, node=node, node_incarnation=0, term=999, leader="c9",
        items=(AssignIntent(job="forged", attempt=1, queue="default",
                            spec=JobSpec(id="forged", command=("/bin/true",))),),
    )  # fmt: skip

    async def forge() -> None:
        # A stranger's participant, discovered through the coordinators' ports like any agent's:
        # agents do not know each other, so it must stand on a coordinator's port to be heard.
        peer = settings.coordinators[0]
        link = await standing_in(lambda: ControlLink(
            settings, "c9", Incarnation(time.time_ns()), own_port=peer.dds_port, reads=(),
            writes=(topics.INTENT,), receive=lambda _bodies: None,
            now_ms=lambda: time.time_ns() // 1_000_000,
        ))  # fmt: skip
        link.start()
        try:
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline:
                link.send(topics.INTENT, intent, 999)
                await asyncio.sleep(0.05)
                if 'reason="bad-signature"' in get(cluster, node, "/metrics"):
                    return
            raise AssertionError("the agent never counted a forged intent")
        finally:
            link.close()

    name = cluster.local.settings.coordinators[0].name
    cluster.local.kill(name, signal.SIGKILL)  # its port is free now
    try:
        asyncio.run(forge())
    finally:
        cluster.local.restart(name)
    state = cluster.view().state
    assert "forged" not in state.jobs
    assert cluster.client.submit(cluster.sh("true")).result(WAIT_S) == b""
