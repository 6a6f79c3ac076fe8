"""One agent process around its state directory: the lock, and what a journal makes it do."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataplane.logs import read_logs
from dataplane.read import scan
from idl.codec import decode
from idl.control import AssignIntent
from idl.dds.domain import discovery_port
from idl.ids import JobId
from idl.jobs import Isolation, JobSpec
from idl.records import AttemptResult
from idl.settings import KafkaSettings
from idl.topics import TopicNames
from node_agent.core.journal import Accepted, Ended, Launching, Origin, Record, fold, read
from node_agent.core.recovery import LAUNCHER_DIED
from node_agent.journal import Journal
from node_agent.sandbox.plan import SandboxOutcome
from node_agent.spool import Piece, Spool
from node_agent.state import StateDir, boot_id

WAIT_S = 120.0
DOMAIN = 122


def write(folder: Path, kafka: KafkaSettings) -> Path:
    secret = folder / "secret"
    secret.write_text("ab" * 32)
    secret.chmod(0o600)
    config = {
        "cluster": folder.name,
        "kafka": {"bootstrap": kafka.bootstrap, "kind": kafka.kind, "prefix": kafka.prefix},
        "dds": {"domain": DOMAIN, "tag": folder.name, "interface": "127.0.0.1"},
        "coordinators": [{"name": "c1", "dds_port": discovery_port(DOMAIN, 0)}],
        "secret_file": str(secret),
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def agent(config: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "node_agent.agent", "--config", str(config), "--name", "n1",
         "--cpu", "2", "--memory", "1Gi", *arguments],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def journal_of(folder: Path, kafka: KafkaSettings, *records: Record) -> None:
    """What an earlier process of the agent left behind."""
    state = StateDir(folder / "state" / "n1")
    scope = f"{folder.name}/{kafka.prefix}main"
    journal = Journal(state.journal, Origin(scope, "n1", boot_id(), 77))
    for record in records:
        journal.append(record)
    journal.close()
    state.close()


def assign(job: str, *command: str) -> AssignIntent:
    spec = JobSpec(id=job, command=command, isolation=Isolation(require=()))
    return AssignIntent(job=job, attempt=1, queue="default", spec=spec)


def results(kafka: KafkaSettings, count: int) -> dict[str, AttemptResult]:
    deadline = time.monotonic() + WAIT_S
    while True:
        records = scan(kafka, TopicNames(kafka.prefix).results)
        found = [decode(record.value, AttemptResult) for record in records]
        if len(found) >= count:
            return {result.job: result for result in found}
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_second_agent_of_a_node_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, KafkaSettings(bootstrap="127.0.0.1:9", kind="embedded"))
    first = StateDir(tmp_path / "state" / "n1")
    with agent(config) as second:
        _, errors = second.communicate(timeout=WAIT_S)
    first.close()
    lines = [line for line in errors.splitlines() if not line.startswith("{")]
    assert second.returncode == 2, errors
    assert len(lines) == 1 and "another agent runs on state directory" in lines[0]


@pytest.mark.kafka
def test_a_journal_is_carried_out(tmp_path: Path, embedded_settings: KafkaSettings) -> None:
    """Ended: delivered, with its output. Accepted: run. Launching, launcher dead: platform."""
    kafka = embedded_settings
    outcome = SandboxOutcome(cause="exited", exit_code=3, result=b"r", stdout_bytes=6)
    journal_of(
        tmp_path, kafka,
        Accepted(assign=assign("over", "/bin/true"), term=4, at_ms=1),
        Ended(job="over", attempt=1, at_ms=2, outcome=outcome),
        Accepted(assign=assign("waits", "/bin/echo", "hello"), term=4, at_ms=1),
        Accepted(assign=assign("gone", "/bin/true"), term=4, at_ms=1),
        Launching(job="gone", attempt=1),
    )  # fmt: skip
    spool = Spool(tmp_path / "state" / "n1" / "output" / "over.1")
    spool.append(Piece("stdout", b"output", 1))
    spool.close()
    (tmp_path / "state" / "n1" / "output" / "stranger.1").write_bytes(b"")
    with agent(write(tmp_path, kafka)) as process:
        found = results(kafka, 3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    over, waits, gone = found["over"], found["waits"], found["gone"]
    assert (over.outcome, over.exit_code, over.result, over.term) == ("failed", 3, b"r", 4)
    assert (over.stdout_tail, over.ended_ms) == (b"output", 2)
    logs = [chunk.data for chunk in read_logs(kafka, JobId("over"), start=over.log)]
    assert logs == [b"output"]
    assert (waits.outcome, waits.stdout_tail) == ("succeeded", b"hello\n")
    assert (gone.outcome, gone.detail) == ("platform", LAUNCHER_DIED)
    state = fold(read((tmp_path / "state" / "n1" / "journal").read_bytes()).records)
    assert state.opened is not None and state.opened.incarnation == 77
    assert state.term == 4 and all(entry.delivered for entry in state.entries.values())
    assert list((tmp_path / "state" / "n1" / "output").iterdir()) == []


def test_results_wait_for_kafka_however_long(tmp_path: Path) -> None:
    """An agent with a result to deliver starts although Kafka is away, and keeps it to the end."""
    kafka = KafkaSettings(bootstrap="127.0.0.1:9", kind="embedded")
    ended = Ended(job="over", attempt=1, at_ms=2, outcome=SandboxOutcome(cause="exited"))
    accepted = Accepted(assign=assign("over", "/bin/true"), term=4, at_ms=1)
    journal_of(tmp_path, kafka, accepted, ended)
    with agent(write(tmp_path, kafka)) as process:
        assert process.stderr is not None
        seen = ""
        while "result not delivered yet" not in seen:
            seen = process.stderr.readline()
            assert seen, "it ended"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    state = fold(read((tmp_path / "state" / "n1" / "journal").read_bytes()).records)
    assert state.entries["over", 1].ended == ended
