"""What every broker does, whichever kind it is: start, health, stop, restart, attach."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.broker import attach_broker, open_broker
from dataplane.broker.local import LocalBroker
from dataplane.broker.processes import identify
from dataplane.kafka import check_reachable
from dataplane.producer import RecordProducer
from dataplane.read import read_range
from dataplane.topics import ensure_topics
from idl.errors import BrokerUnavailableError, ConfigError, PlatformFaultError
from idl.settings import KafkaSettings
from idl.topics import TopicSettings
from tests.integration.conftest import require_apache

pytestmark = pytest.mark.kafka
KINDS = ["embedded", pytest.param("apache", marks=pytest.mark.apache)]


def _own(kind: str, directory: Path) -> LocalBroker:
    if kind == "apache":
        require_apache()
    found = open_broker(kind, directory)
    assert isinstance(found, LocalBroker)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_life(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Start, answer, be found by a directory, stop by another object, start again."""
    lines: list[str] = []
    broker = _own(kind, tmp_path / "b")
    assert not broker.healthy() and not broker.pids
    broker.start(lines.append)
    try:
        assert broker.healthy()
        assert check_reachable(KafkaSettings(bootstrap=broker.bootstrap)) == 1
        assert any(broker.bootstrap in line for line in lines)
        before = (broker.pids, broker.bootstrap)
        broker.start()
        assert (broker.pids, broker.bootstrap) == before, "start is idempotent"
        attached = attach_broker(tmp_path / "b")
        assert attached is not None
        assert (attached.pids, attached.bootstrap) == before and attached.kind == kind
        attached.stop()
        assert not broker.pids and not broker.healthy()
        attached.stop()
        broker.stop()
        assert identify(before[0][0]) is None
    finally:
        broker.stop()
    assert capfd.readouterr() == ("", ""), "brokers and clients print nothing"
    assert broker.log_path(0).exists()


@pytest.mark.apache
def test_apache_keeps_records_over_a_restart_on_the_same_port(tmp_path: Path) -> None:
    broker = _own("apache", tmp_path)
    broker.start()
    try:
        settings = KafkaSettings(bootstrap=broker.bootstrap, kind="apache")
        ensure_topics(settings, [TopicSettings(name="kept")])
        producer = RecordProducer(settings)
        producer.send("kept", b"value").result(20)
        producer.close()
        broker.stop()
        again = attach_broker(tmp_path)
        assert again is not None
        again.start()
        assert again.bootstrap == settings.bootstrap
        assert [r.value for r in read_range(settings, "kept", 0)] == [b"value"]
    finally:
        broker.stop()  # finds what `again` started: the record is the truth, not the object
    assert not again.pids


def test_outlives_its_starter(tmp_path: Path) -> None:
    """`outrider up` ends; its broker goes on; `outrider down` stops it."""
    code = (
        "import sys; from pathlib import Path; from dataplane.broker import open_broker\n"
        "b = open_broker('embedded', Path(sys.argv[1])); b.start(); print(b.pids[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    broker = attach_broker(tmp_path)
    assert broker is not None
    assert broker.pids == (int(done.stdout),)
    assert os.getsid(broker.pids[0]) == broker.pids[0]
    assert broker.healthy()
    broker.stop()
    assert not broker.pids


def test_killed_broker_is_not_healthy_and_starts_again(tmp_path: Path) -> None:
    broker = _own("embedded", tmp_path)
    broker.start()
    try:
        first = broker.pids
        os.kill(first[0], signal.SIGKILL)
        os.waitid(os.P_PID, first[0], os.WEXITED | os.WNOWAIT)
        assert not broker.pids and not broker.healthy()
        broker.start()
        assert broker.healthy() and first[0] not in broker.pids
    finally:
        broker.stop()


def test_a_taken_port_is_replaced(tmp_path: Path) -> None:
    """The port of the last start belongs to somebody else now."""
    first, second = _own("embedded", tmp_path / "1"), _own("embedded", tmp_path / "2")
    try:
        first.start()
        first.stop()
        (tmp_path / "2").mkdir()
        record = (tmp_path / "1" / "broker.json").read_text()
        (tmp_path / "2" / "broker.json").write_text(record)
        second.start()
        first.start()
        assert first.healthy() and second.healthy() and first.bootstrap != second.bootstrap
    finally:
        first.stop()
        second.stop()


def test_reused_pid_is_never_signalled(tmp_path: Path) -> None:
    """A record whose pid now belongs to somebody else: nothing of ours runs, nothing is killed."""
    (tmp_path / "broker.json").write_text(
        '{"kind":"embedded","bootstrap":"127.0.0.1:1","ports":[1],'
        f'"processes":[{{"pid":{os.getpid()},"started_ticks":1}}]}}'
    )
    broker = attach_broker(tmp_path)
    assert broker is not None and not broker.pids
    broker.stop()


def test_existing_broker_is_asked_and_left_alone(tmp_path: Path) -> None:
    own = _own("embedded", tmp_path / "own")
    own.start()
    try:
        other = open_broker(own.bootstrap, tmp_path / "other")
        other.start()
        assert other.healthy() and other.kind == "existing" and other.durable
        other.stop()
        assert own.healthy()
    finally:
        own.stop()
    assert not other.healthy()


def test_unreachable_broker_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailableError) as caught:
        check_reachable(KafkaSettings(bootstrap="127.0.0.1:1"), timeout_s=0.3)
    assert "127.0.0.1:1" in str(caught.value) and "outrider up" in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.retryable


def test_a_broker_that_cannot_start_says_where_its_log_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "tansu"
    script.write_text("#!/bin/sh\necho cannot do this; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr("dataplane.broker.embedded.tansu_binary", lambda: script)
    with pytest.raises(PlatformFaultError, match=r"cannot do this.*node-0\.log"):
        open_broker("embedded", tmp_path / "b").start()


@pytest.mark.parametrize("spec", ["", "kafka", "host", "host:port", "a:1,,b:2", "http://x:1"])
def test_unknown_broker_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedded, apache, or HOST:PORT"):
        open_broker(spec, tmp_path)
