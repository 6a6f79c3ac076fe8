"""Whole path, real processes: what a service that submits jobs sees."""

import hashlib
import json
import os
import time

import pytest

from dataplane.dead_letter import read_dead_letters
from dataplane.producer import RecordProducer
from idl.codec import JSON
from idl.ids import QueueName
from idl.ledger import Assigned, Finished, Ingested, Rejected, Released, Started
from idl.topics import TopicNames
from node_agent.sandbox.settings import interpreter
from outrider.client.errors import JobCancelledError, JobFailedError, JobRejectedError
from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.slow
WAIT_S = 60.0


def test_a_job_runs_and_its_story_is_in_the_ledger(cluster: Cluster) -> None:
    handle = cluster.client.submit(
        cluster.sh("echo out; echo err >&2; sleep 0.3; printf 42 > $OUTRIDER_RESULT", id="story")
    )
    assert handle.result(WAIT_S) == b"42"
    output = {(chunk.stream, chunk.data) for chunk in handle.logs()}
    assert output == {("stdout", b"out\n"), ("stderr", b"err\n")}
    record = handle.attempt_result()
    assert record is not None
    assert (record.outcome, record.exit_code, record.attempt) == ("succeeded", 0, 1)
    assert record.assigned_ms <= record.started_ms <= record.ended_ms
    story: list[type] = []
    from outrider.client.view import LedgerView

    LedgerView(cluster.local.settings).advance(
        lambda _offset, entry, verdict: story.extend(
            type(d)
            for d in entry.decisions
            if verdict.valid
            and (
                getattr(d, "job", None) == "story"
                or (isinstance(d, Ingested) and d.job.id == "story")
            )
        )
    )
    assert story == [Ingested, Assigned, Started, Released, Finished]


@pytest.mark.parametrize("size", [100, 1_500_000], ids=["inline", "claim-check"])
def test_a_payload_reaches_the_job_byte_for_byte(cluster: Cluster, size: int) -> None:
    data = os.urandom(size)
    job = cluster.sh("sha256sum | cut -c1-64 > $OUTRIDER_RESULT", payload=data)
    digest = hashlib.sha256(data).hexdigest().encode() + b"\n"
    assert cluster.client.submit(job).result(WAIT_S) == digest


def test_a_large_result_comes_back(cluster: Cluster) -> None:
    job = cluster.sh("head -c 1000000 /dev/zero > $OUTRIDER_RESULT")
    assert cluster.client.submit(job).result(WAIT_S) == b"\0" * 1_000_000


def test_a_failing_job_is_retried_then_dead_lettered(cluster: Cluster) -> None:
    handle = cluster.client.submit(cluster.sh("echo no; exit 7", id="fails", retries=1))
    with pytest.raises(JobFailedError) as caught:
        handle.result(WAIT_S)
    assert caught.value.exit_code == 7
    assert len(caught.value.attempts) == 2

    def letters() -> list[str]:
        return [letter.key for _, letter in read_dead_letters(cluster.local.settings.kafka)]

    deadline = time.monotonic() + WAIT_S
    while "fails" not in letters() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "fails" in letters()


def test_a_job_that_succeeds_at_its_second_attempt_has_one_result(cluster: Cluster) -> None:
    job = cluster.sh('[ "$OUTRIDER_ATTEMPT" = 2 ] && printf ok > $OUTRIDER_RESULT', retries=3)
    handle = cluster.client.submit(job)
    assert handle.result(WAIT_S) == b"ok"
    assert len(handle.status().attempts) == 2


def test_a_running_job_is_cancelled_and_its_room_comes_back(cluster: Cluster) -> None:
    handle = cluster.client.submit(cluster.sh("sleep 600"))
    deadline = time.monotonic() + WAIT_S
    while handle.status().phase != "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    handle.cancel()
    with pytest.raises(JobCancelledError):
        handle.result(WAIT_S)
    state = cluster.view().state
    assert handle.job not in {job for node in state.nodes.values() for job, *_ in node.attempts}


def test_a_time_limit_holds(cluster: Cluster) -> None:
    handle = cluster.client.submit(
        cluster.sh("trap '' TERM; sleep 600", timeout="500ms", grace="100ms")
    )
    with pytest.raises(JobFailedError) as caught:
        handle.result(WAIT_S)
    assert caught.value.outcome == "timed_out"


def test_any_kafka_client_may_submit_and_a_bad_record_is_an_explicit_rejection(
    cluster: Cluster,
) -> None:
    kafka = cluster.local.settings.kafka
    topic = TopicNames(kafka.prefix).queue(QueueName("default"))
    producer = RecordProducer(kafka, name="foreign")
    bad = producer.send(topic, b"\x00\xff nonsense", content_type=JSON).result(WAIT_S)
    good = {
        "command": ["/bin/true"],
        "isolation": {"require": ["filesystem"]},
        "resources": {"cpu_millis": 100, "memory_bytes": 16 << 20},
    }
    producer.send(topic, json.dumps(good).encode(), key="plain-json").result(WAIT_S)
    producer.close()
    cluster.client.submit(cluster.sh("true")).result(WAIT_S)
    view = cluster.view()
    rejected: list[Rejected] = []
    from outrider.client.view import LedgerView

    LedgerView(cluster.local.settings).advance(
        lambda _o, entry, _v: rejected.extend(d for d in entry.decisions if isinstance(d, Rejected))
    )
    assert [r.code for r in rejected if r.source == bad] == ["not-utf8-json"]
    assert "plain-json" in view.state.jobs or "plain-json" in view.state.ended


def test_an_id_is_used_once(cluster: Cluster) -> None:
    cluster.client.submit(cluster.sh("true", id="once")).result(WAIT_S)
    second = cluster.client.submit(cluster.sh("true", id="once"))
    with pytest.raises(JobRejectedError, match="duplicate"):
        second.result(WAIT_S)


def test_a_job_no_node_can_hold_says_so(cluster: Cluster) -> None:
    handle = cluster.client.submit(cluster.sh("true", cpu=500, start_within="1s"))
    with pytest.raises(JobFailedError, match="cpu"):
        handle.result(WAIT_S)


def test_a_python_function_is_mapped(cluster: Cluster) -> None:
    def square(number: int) -> int:
        return number * number

    template = cluster.job("unused")
    found = cluster.client.map(
        square, [1, 2, 3], template=template, interpreter=interpreter(), timeout=WAIT_S
    )
    assert list(found) == [1, 4, 9]
