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
from idl.ledger import Assigned, Decision, Finished, Ingested, Rejected, Released, Started
from idl.topics import TopicNames
from node_agent.sandbox.settings import interpreter
from outrider.client.errors import JobCancelledError, JobFailedError
from outrider.client.view import LedgerView
from tests.e2e.conftest import Cluster
from tests.patience import patient

pytestmark = pytest.mark.slow
WAIT_S = float(patient(180))


def decisions(cluster: Cluster) -> list[Decision]:
    """Every valid decision so far, in order."""
    found: list[Decision] = []
    LedgerView(cluster.local.settings).advance(
        lambda _offset, entry, verdict: found.extend(entry.decisions if verdict.valid else ())
    )
    return found


def test_a_job_runs_and_its_story_is_in_the_ledger(cluster: Cluster) -> None:
    handle = cluster.client.submit(
        cluster.sh("echo out; echo err >&2; sleep 3; printf 42 > $OUTRIDER_RESULT", id="story")
    )
    assert handle.result(WAIT_S) == b"42"
    output = {(chunk.stream, chunk.data) for chunk in handle.logs()}
    assert output == {("stdout", b"out\n"), ("stderr", b"err\n")}
    record = handle.attempt_result()
    assert record is not None
    assert (record.outcome, record.exit_code, record.attempt) == ("succeeded", 0, 1)
    assert record.assigned_ms <= record.started_ms <= record.ended_ms
    story = [
        type(d)
        for d in decisions(cluster)
        if getattr(d, "job", "") == "story" or (isinstance(d, Ingested) and d.job.id == "story")
    ]
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
    assert handle.job not in {job for node in state.nodes.values() for job in node.attempts}


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
    rejected = [d for d in decisions(cluster) if isinstance(d, Rejected)]
    assert [r.code for r in rejected if r.source == bad] == ["not-utf8-json"]
    assert "plain-json" in {d.job.id for d in decisions(cluster) if isinstance(d, Ingested)}


def test_submitting_an_id_again_runs_nothing_again(cluster: Cluster) -> None:
    job = cluster.sh("date +%N > $OUTRIDER_RESULT", id="once")
    first = cluster.client.submit(job).result(WAIT_S)
    assert cluster.client.submit(job).result(WAIT_S) == first, "the same job, the same result"
    duplicates = [d for d in decisions(cluster) if isinstance(d, Rejected) and d.job == "once"]
    eventually_rejected = time.monotonic() + WAIT_S
    while not duplicates and time.monotonic() < eventually_rejected:
        time.sleep(0.1)
        duplicates = [d for d in decisions(cluster) if isinstance(d, Rejected) and d.job == "once"]
    assert [d.code for d in duplicates] == ["duplicate"]
    assert len([d for d in decisions(cluster) if isinstance(d, Assigned) and d.job == "once"]) == 1


def test_a_job_no_node_can_hold_says_so(cluster: Cluster) -> None:
    handle = cluster.client.submit(cluster.sh("true", cpu=500, start_within="1s"))
    with pytest.raises(JobFailedError, match="NoMatchingNode: no node offers 500 CPUs"):
        handle.result(WAIT_S)


def test_a_python_function_is_mapped(cluster: Cluster) -> None:
    def square(number: int) -> int:
        return number * number

    found = cluster.client.map(
        square,
        [1, 2, 3],
        python=interpreter(),
        cpu="200m",
        memory="64Mi",
        allow_unenforced=cluster.unenforced(),
    )
    assert list(found) == [1, 4, 9]
