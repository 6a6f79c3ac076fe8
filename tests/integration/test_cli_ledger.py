"""The CLI against a real embedded broker and a ledger written by hand."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from dataplane.dead_letter import write_dead_letter
from dataplane.logs import AttemptLog
from dataplane.producer import RecordProducer
from idl.ids import Attempt, JobId
from idl.jobs import SourceRef
from idl.ledger import DeadLettered, DeadLetterStored, Finished, TermStarted
from idl.records import AttemptStory, DeadLetter
from idl.settings import KafkaSettings
from outrider.cli.main import cli
from tests.integration.fake_leader import POOL, QUEUE, FakeLeader, cluster_settings

pytestmark = pytest.mark.kafka
Run = Callable[..., Result]


@pytest.fixture
def leader(embedded_settings: KafkaSettings) -> Iterator[FakeLeader]:
    leader = FakeLeader(embedded_settings)
    leader.lead()
    leader.see_node("n1")
    leader.see_node("n2", enforces=("memory", "pids"))
    yield leader
    leader.close()


@pytest.fixture
def config(leader: FakeLeader, tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    path.write_bytes(msgspec.json.encode(cluster_settings(leader.kafka)))
    return path


@pytest.fixture
def run(config: Path) -> Run:
    def invoke(*words: str, **options: Any) -> Result:
        env = {"OUTRIDER_CONFIG": str(config)}
        return CliRunner().invoke(cli, list(words), env=env, **options)

    return invoke


def submitted(run: Run, leader: FakeLeader, *jobs: str) -> None:
    for job in jobs:
        assert run("submit", "--id", job, "--group", "g", "--", "echo", job).exit_code == 0
    leader.ingest()


def dead(leader: FakeLeader, job: str) -> None:
    """Ends a job without a result and stores its dead letter, as a leader does."""
    leader.start(job)
    leader.append(
        leader.report(job, outcome="failed", exit_code=9),
        DeadLettered(job=job, code="AttemptsExhausted", reason="exit code 9"),
    )
    letter = DeadLetter(
        key=job, queue=QUEUE, job=job, code="AttemptsExhausted", reason="exit code 9",
        at_ms=1_760_000_000_000, source=SourceRef(topic="t", partition=0, offset=0),
        original=b'{"command": ["false"], "id": "%s"}' % job.encode(),
        content_type="application/json",
        attempts=(AttemptStory(attempt=1, node="n1", outcome="failed", exit_code=9),),
    )  # fmt: skip
    producer = RecordProducer(leader.kafka, name="letters")
    asyncio.run(write_dead_letter(producer, leader.kafka, letter))
    producer.close()
    leader.append(DeadLetterStored(key=job))


def data(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_status_tells_leader_queues_unread_nodes_and_kafka(run: Run, leader: FakeLeader) -> None:
    submitted(run, leader, "a", "b", "c")
    leader.start("a")
    assert run("submit", "--", "true").exit_code == 0
    document = data(run("status", "--json"))
    assert (document["leader"], document["term"]) == ("c1", 1)
    assert document["kafka"]["state"] == "ok"
    (row,) = document["queues"]
    assert (row["unread"], row["pending"], row["running"]) == (1, 2, 1)
    used = {node["node"]: node["cpu_millis_used"] for node in document["nodes"]}
    assert used == {"n1": 1000, "n2": 0}
    human = run("status").stdout
    assert "leader   c1, term 1" in human
    assert "all but cpu, network" in human


def test_ls_filters_by_state_queue_and_group(run: Run, leader: FakeLeader) -> None:
    submitted(run, leader, "a", "b")
    leader.start("a")
    leader.finish("a")
    assert [row["job"] for row in data(run("ls", "--json"))] == ["a", "b"]
    assert [row["job"] for row in data(run("ls", "--state", "ended", "--json"))] == ["a"]
    assert data(run("ls", "--group", "other", "--json")) == []
    assert [row["job"] for row in data(run("ls", "--limit", "1", "--json"))] == ["b"]
    assert "finished" in run("ls").stdout
    assert "1 older not shown" in run("ls", "--limit", "1").stderr


def test_why_and_queue_explain_a_pending_job(run: Run, leader: FakeLeader) -> None:
    submitted(run, leader, "first")
    assert run("submit", "--id", "fat", "--memory", "1000Gi", "--", "x").exit_code == 0
    leader.ingest()
    found = data(run("why", "fat", "--json"))
    assert (found["code"], found["position"]) == ("NoMatchingNode", 2)
    assert "memory" in run("queue", "fat").stdout
    missing = run("why", "nothing")
    assert missing.exit_code == 3
    assert missing.stderr.count("\n") == 1
    (row,) = data(run("queue", "--json"))
    assert row["pending"] == 2


def test_events_are_lines_and_void_ones_only_on_demand(run: Run, leader: FakeLeader) -> None:
    submitted(run, leader, "a")
    leader.start("a")
    successor = FakeLeader(leader.kafka, "c2", term=2)
    successor.lead("c1 was silent")
    successor.close()
    leader.append(Finished(job="a", attempt=1))
    human = run("events").stdout
    assert "c2 leads pool main in term 2 (c1 was silent)" in human
    assert "job a attempt 1 placed on n1" in human
    assert "finished" not in human
    assert "VOID (older_term" in run("events", "--void").stdout
    lines = [json.loads(line) for line in run("events", "--job", "a", "--json").stdout.splitlines()]
    assert [line["decision"]["t"] for line in lines] == ["ingested", "assigned", "started"]
    assert run("events", "--job", "nobody").exit_code == 3
    assert len(data(run("leader", "--json"))["terms"]) == 2
    assert "c1 was silent" in run("leader").stdout


def test_result_and_logs_give_the_jobs_own_bytes(
    run: Run, leader: FakeLeader, tmp_path: Path
) -> None:
    submitted(run, leader, "a", "b")
    leader.start("a")
    assert run("result", "a").exit_code == 3
    producer = RecordProducer(leader.kafka, name="logs")
    log = AttemptLog(producer, leader.kafka, JobId("a"), Attempt(1))

    async def write() -> None:
        await log.write("stdout", b"out\n", 1)
        await log.write("stderr", b"err\n", 2)

    asyncio.run(write())
    producer.close()
    leader.finish("a", result=b"\x00\x01", stdout=b"out\n", log=log.first)
    assert run("result", "a").stdout_bytes == b"\x00\x01"
    target = tmp_path / "out.bin"
    assert run("result", "a", "-o", str(target)).exit_code == 0
    assert target.read_bytes() == b"\x00\x01"
    assert data(run("result", "a", "--json"))["result"]["usage"]["wall_ms"] == 12
    told = run("logs", "a")
    assert (told.stdout, told.stderr) == ("out\n", "err\n")
    assert run("logs", "a", "--follow").stdout == "out\n"
    assert run("logs", "a", "--attempt", "2").exit_code == 3
    assert run("logs", "b").exit_code == 3
    assert run("result", "nothing").exit_code == 3


def test_dead_letters_are_listed_shown_and_replayed(run: Run, leader: FakeLeader) -> None:
    submitted(run, leader, "bad")
    dead(leader, "bad")
    (row,) = data(run("dlq", "ls", "--json"))
    assert (row["key"], row["code"], row["attempts"]) == ("bad", "AttemptsExhausted", 1)
    assert "exit code 9" in run("dlq", "show", "bad").stdout
    assert run("dlq", "replay", "bad").stdout == "bad.r1\n"
    assert leader.ingest() == ["bad.r1"]
    assert run("dlq", "replay", "bad").stdout == "bad.r2\n"
    assert run("dlq", "show", "good").exit_code == 3
    failed = run("result", "bad")
    assert failed.exit_code == 1
    assert "exit code 9" in failed.stderr


def test_escape_sequences_of_submitters_do_not_reach_the_terminal(
    run: Run, leader: FakeLeader
) -> None:
    assert run("submit", "--id", "evil", "--", "echo", "\x1b]0;owned\x07").exit_code == 0
    leader.ingest()
    leader.start("evil")
    leader.append(
        leader.report("evil", outcome="failed", exit_code=1),
        DeadLettered(job="evil", code="x", reason="\x1b[2Jgone"),
    )
    for words in (("events",), ("ls",), ("why", "evil"), ("result", "evil")):
        result = run(*words)
        assert "\x1b" not in result.output
        assert "\\x1b" in result.output


def test_audit_counts_and_finds_what_cannot_be(run: Run, leader: FakeLeader) -> None:
    submitted(run, leader, "a", "b", "c")
    leader.start("a")
    leader.finish("a")
    dead(leader, "b")
    document = data(run("audit", "--json"))
    assert document["ok"]
    assert [document[key] for key in ("accepted", "ended", "live")] == [3, 2, 1]
    assert "every invariant holds" in run("audit").stdout
    leader.append(Finished(job="a", attempt=1))
    broken = run("audit")
    assert broken.exit_code == 1
    assert "ended already" in broken.stderr
    assert broken.stderr.count("\n") == 1


def test_nodes_show_what_is_offered_used_and_enforced(run: Run, leader: FakeLeader) -> None:
    first, second = data(run("nodes", "--json"))
    assert (first["node"], first["missing"], first["labels"]) == ("n1", [], {"zone": "a"})
    assert "network" in second["missing"]
    assert "everything" in run("nodes").stdout


def test_orders_for_what_is_not_there_are_refused_at_once(run: Run, leader: FakeLeader) -> None:
    assert run("cancel", "nothing").exit_code == 3
    assert run("cancel", "--group", "nothing").exit_code == 3
    assert run("cancel").exit_code == 2
    assert run("drain", "n9").exit_code == 3


def test_topics_are_created_once(run: Run, leader: FakeLeader) -> None:
    report = data(run("topics", "--json"))
    assert (report["created"], len(report["existing"])) == ([], 8)


def test_a_submission_in_json_names_its_place(run: Run, leader: FakeLeader) -> None:
    document = data(run("submit", "--id", "x", "--json", "--", "true"))
    assert document["jobs"][0]["job"] == "x"
    assert document["jobs"][0]["source"]["topic"].endswith("queue.default")
    lines = run("submit", "--array", "3", "--id", "arr", "--", "true").stdout
    assert lines.split() == ["arr-0", "arr-1", "arr-2"]


def test_an_unreachable_broker_is_one_line_and_its_own_code(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    kafka = KafkaSettings(bootstrap="127.0.0.1:1")
    path.write_bytes(msgspec.json.encode(cluster_settings(kafka)))
    result = CliRunner().invoke(cli, ["status", "--config", str(path)])
    assert result.exit_code == 4
    assert result.stderr.startswith("outrider: ")
    assert result.stderr.count("\n") == 1


def test_a_term_that_was_never_started_counts_for_nothing(run: Run, leader: FakeLeader) -> None:
    zombie = FakeLeader(leader.kafka, "c7", term=0)
    zombie.append(TermStarted(pool=POOL, previous_term=0))
    zombie.close()
    assert data(run("status", "--json"))["void_entries"] == 1
