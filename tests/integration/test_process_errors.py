"""What a person sees when a process cannot start: one line that says what to do; exit codes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.broker import Broker
from idl.dds.domain import discovery_port

COORDINATOR = "controlplane.coordinator"
AGENT = "node_agent.agent"


def write(folder: Path, bootstrap: str, domain: int = 120, **more: object) -> Path:
    secret = folder / "secret"
    secret.write_text("ab" * 32)
    secret.chmod(0o600)
    config = {
        "cluster": folder.name,
        "kafka": {"bootstrap": bootstrap, "kind": "embedded"},
        "dds": {"domain": domain, "tag": folder.name, "interface": "127.0.0.1"},
        "coordinators": [{"name": "c1", "dds_port": discovery_port(domain, 0)}],
        "secret_file": str(secret),
        **more,
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(config))
    return path


def start(module: str, config: Path, *arguments: str, name: str = "c1") -> tuple[int, list[str]]:
    """Exit code and the lines on stderr that are not log lines."""
    run = subprocess.run(
        [sys.executable, "-m", module, "--config", str(config), "--name", name, *arguments],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    lines = [line for line in run.stderr.splitlines() if not line.startswith("{")]
    return run.returncode, lines


@pytest.mark.parametrize("module", [COORDINATOR, AGENT])
def test_no_broker(tmp_path: Path, module: str) -> None:
    config = write(tmp_path, "127.0.0.1:9")
    raw = json.loads(config.read_text())
    raw["kafka"]["start_wait_ms"] = 0  # else it would wait for Kafka: tests/unit/test_patience.py
    config.write_text(json.dumps(raw))
    code, lines = start(module, config)
    assert code == 1
    assert len(lines) == 1
    assert "127.0.0.1:9" in lines[0]


@pytest.mark.parametrize("module", [COORDINATOR, AGENT])
def test_no_config(tmp_path: Path, module: str) -> None:
    code, lines = start(module, tmp_path / "none.json")
    assert (code, len(lines)) == (2, 1)
    assert "cannot read cluster file" in lines[0]


def test_a_name_that_is_no_member(tmp_path: Path) -> None:
    code, lines = start(COORDINATOR, write(tmp_path, "127.0.0.1:9"), name="c9")
    assert (code, len(lines)) == (2, 1)
    assert "'c9' is not in the cluster file (there: c1)" in lines[0]


def test_a_secret_that_others_can_read(tmp_path: Path) -> None:
    config = write(tmp_path, "127.0.0.1:9")
    (tmp_path / "secret").chmod(0o644)
    code, lines = start(COORDINATOR, config)
    assert (code, len(lines)) == (2, 1)
    assert "chmod 600" in lines[0]


def test_a_dds_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", discovery_port(121, 0)))
        code, lines = start(COORDINATOR, write(tmp_path, "127.0.0.1:9", domain=121))
    assert (code, len(lines)) == (2, 1), lines
    assert "UDP port" in lines[0]


def test_a_metrics_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, lines = start(COORDINATOR, write(tmp_path, "127.0.0.1:9"), "--metrics-port", port)
    assert (code, len(lines)) == (1, 1)
    assert "--metrics-port" in lines[0]


def test_topics_that_are_missing(tmp_path: Path, embedded_broker: Broker) -> None:
    config = write(tmp_path, embedded_broker.bootstrap)
    raw = json.loads(config.read_text())
    raw["kafka"]["prefix"] = f"{tmp_path.name}-none."
    config.write_text(json.dumps(raw))
    code, lines = start(COORDINATOR, config)
    assert (code, len(lines)) == (2, 1), lines
    assert "queue.default" in lines[0]
