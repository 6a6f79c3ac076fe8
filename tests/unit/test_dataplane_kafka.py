"""Client settings, the judgement of librdkafka's statistics, and what needs no broker."""

import json
import logging
import uuid
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from confluent_kafka import KafkaError, KafkaException

import dataplane.broker
from dataplane.broker import apache, embedded, processes
from dataplane.broker.cache import cache_directory
from dataplane.kafka import (
    STALL_MS,
    BrokerWatch,
    _OneOfAKind,
    checked,
    consumer_config,
    producer_config,
)
from dataplane.payloads import CACHE_RECORD_BYTES_MAX, _RecordCache
from dataplane.records import KafkaRecord
from idl.errors import BrokerUnavailableError, ConfigError, PlatformFaultError
from idl.limits import KAFKA_RECORD_BYTES_MAX
from idl.settings import KafkaSettings


@pytest.mark.parametrize(("kind", "wait_ms"), [("embedded", 5), ("apache", 500), ("existing", 500)])
def test_fetch_wait_is_the_brokers(kind: str, wait_ms: int) -> None:
    settings = msgspec.convert({"kind": kind}, KafkaSettings)
    assert consumer_config(settings, "x")["fetch.wait.max.ms"] == wait_ms


def test_settings_of_the_person_win() -> None:
    settings = KafkaSettings(
        client={"fetch.wait.max.ms": "77", "acks": "1", "security.protocol": "SSL"}
    )
    consumer = consumer_config(settings, "x", **{"enable.partition.eof": True})
    producer = producer_config(settings, "x", delivery_timeout_ms=5, linger_ms=0)
    assert consumer["fetch.wait.max.ms"] == "77" and consumer["enable.partition.eof"]
    assert producer["acks"] == "1"
    assert consumer["security.protocol"] == producer["security.protocol"] == "SSL"


def test_producers_are_safe_by_default() -> None:
    found = producer_config(KafkaSettings(), "x", delivery_timeout_ms=1234, linger_ms=0)
    assert found["acks"] == "all" and found["enable.idempotence"]
    assert found["message.max.bytes"] == KAFKA_RECORD_BYTES_MAX
    assert found["message.timeout.ms"] == 1234


def test_readers_never_jump_or_join() -> None:
    found = consumer_config(KafkaSettings(), "x")
    assert found["auto.offset.reset"] == "error"
    assert not found["enable.auto.commit"] and not found["allow.auto.create.topics"]


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (KafkaError._TRANSPORT, BrokerUnavailableError, "outrider up"),
        (KafkaError._TIMED_OUT, BrokerUnavailableError, "outrider up"),
        (KafkaError.NOT_LEADER_FOR_PARTITION, BrokerUnavailableError, "outrider up"),
        (KafkaError.SASL_AUTHENTICATION_FAILED, PlatformFaultError, "credentials"),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, PlatformFaultError, "ACLs"),
        (KafkaError._INVALID_ARG, ConfigError, "cluster file"),
        (KafkaError.POLICY_VIOLATION, PlatformFaultError, "doing"),
    ],
)
def test_errors_of_the_library_become_ours(code: int, kind: type[Exception], says: str) -> None:
    found = checked(KafkaException(KafkaError(code)), "doing", KafkaSettings())
    assert type(found) is kind and says in str(found) and "\n" not in str(found)


def _stats(brokers: list[tuple[int, str, int]], leaders: dict[str, int]) -> str:
    return json.dumps(
        {
            "brokers": {
                str(n): {"nodeid": n, "state": state, "rxidle": idle, "more": 1}
                for n, state, idle in brokers
            },
            "topics": {"t": {"partitions": {p: {"leader": n} for p, n in leaders.items()}}},
        }
    )


IDLE_US = (STALL_MS + 1) * 1000


@pytest.mark.parametrize(
    ("brokers", "leaders", "why"),
    [
        ([(1, "UP", 10)], {"0": 1}, ""),
        ([(1, "UP", -1)], {"0": 1}, ""),
        ([(1, "DOWN", 10)], {"0": 1}, "no broker is connected"),
        ([], {}, "no broker is connected"),
        ([(1, "UP", IDLE_US)], {"0": 1}, "no broker has answered"),
        ([(1, "UP", IDLE_US), (2, "UP", 5)], {"0": 2}, ""),
        ([(1, "DOWN", 5), (2, "UP", 5)], {"0": 1}, "the leader of t[0]"),
        ([(1, "DOWN", 5), (2, "UP", 5)], {"0": 2, "1": 1}, ""),
        ([(1, "UP", 5)], {"0": -1}, "the leader of t[0]"),
        ([(1, "UP", 5)], {}, ""),
    ],
)
def test_when_a_broker_stalls(
    brokers: list[tuple[int, str, int]], leaders: dict[str, int], why: str
) -> None:
    watch = BrokerWatch()
    assert watch.look(_stats(brokers, leaders), {("t", 0)}) is bool(why)
    assert watch.why.startswith(why) and bool(watch.why) == bool(why)
    assert not watch.look(_stats(brokers, leaders), {("t", 0)}), "told once"
    well = _stats([(1, "UP", 1)], {"0": 1})
    assert watch.look(well, {("t", 0)}) is bool(why)
    assert watch.why == ""


def test_pom_names_the_version_that_the_code_names() -> None:
    pom = Path(dataplane.broker.__file__).parent / "pom.xml"
    versions = {node.text for node in ElementTree.parse(pom).iter() if node.tag == "version"}
    assert apache.VERSION in versions


def test_missing_java_and_maven_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PlatformFaultError, match="openjdk-17-jre-headless"):
        apache.find_java()
    with pytest.raises(PlatformFaultError, match="install maven"):
        apache.fetch_jars(lambda _line: None)
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    (tmp_path / "java").chmod(0o755)
    with pytest.raises(PlatformFaultError, match="is 11; install"):
        apache.find_java()


def test_maven_that_fails_leaves_no_half_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mvn").write_text("#!/bin/sh\necho '[ERROR] no network'; exit 1\n")
    (tmp_path / "mvn").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(PlatformFaultError, match=r"no network.*embedded broker") as caught:
        apache.fetch_jars(lambda _line: None)
    assert caught.value.retryable
    assert list((tmp_path / "cache").iterdir()) == []


def test_cluster_ids_never_look_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` starts one random base64url id in 64, and Kafka's StorageTool takes it for an option."""
    dash, plain = uuid.UUID(bytes=b"\xfb" * 16), uuid.UUID(bytes=b"\x01" * 16)
    found = iter([dash, plain])
    monkeypatch.setattr("dataplane.broker.apache.uuid.uuid4", lambda: next(found))
    assert not apache._random_cluster_id().startswith("-")


@pytest.mark.parametrize("nodes", [0, 2, 4])
def test_nodes_of_a_local_apache(nodes: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 or 3"):
        apache.ApacheBroker(tmp_path, nodes)


def test_binary_without_the_x_bit_is_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    plain = tmp_path / "tansu"
    plain.write_text("#!/bin/sh\n")
    copy = embedded._executable_copy(plain)
    assert copy.read_text() == plain.read_text() and copy.stat().st_mode & 0o111
    stamp = copy.stat().st_mtime_ns
    assert embedded._executable_copy(plain) == copy and copy.stat().st_mtime_ns == stamp


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUTRIDER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "outrider"
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(PlatformFaultError, match="set OUTRIDER_CACHE"):
        cache_directory()


def test_damaged_broker_record_is_one_line(tmp_path: Path) -> None:
    assert processes.read_record(tmp_path) is None
    (tmp_path / "broker.json").write_text("{")
    with pytest.raises(PlatformFaultError, match="damaged"):
        processes.read_record(tmp_path)


def _record(offset: int, size: int) -> KafkaRecord:
    return KafkaRecord("t", 0, offset, None, bytes(size))


def test_payload_cache_is_bounded_by_bytes() -> None:
    cache = _RecordCache(100)
    for offset in range(4):
        cache.put(_record(offset, 40))
    kept = [o for o in range(4) if cache.get(_record(o, 0).source) is not None]
    assert kept == [2, 3]
    cache.put(_record(9, 101))
    assert cache.get(_record(9, 0).source) is None
    assert CACHE_RECORD_BYTES_MAX < 32 * 2**20


def test_a_kafka_that_is_away_does_not_flood_the_log() -> None:
    """librdkafka repeats "Connection refused" a hundred times a second for each client."""
    quiet = _OneOfAKind()

    def told(client: str, at: float) -> str | None:
        record = logging.LogRecord(
            "outrider.kafka", logging.ERROR, "", 0, "FAIL [%s] away", (client,), None
        )
        record.created = at
        return record.getMessage() if quiet.filter(record) else None

    assert told("a", 0.0) == "FAIL [a] away"
    assert [told("a", 0.1 * n) for n in range(1, 99)] == [None] * 98
    assert told("b", 1.0) == "FAIL [b] away"
    assert told("a", 10.5) == "FAIL [a] away (98 more like it)"
