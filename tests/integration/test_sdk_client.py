"""The SDK against a real embedded broker and a ledger written by hand."""

from collections.abc import Iterator

import pytest

from idl.errors import ConfigError
from idl.ledger import Cancelled, DeadLettered, Finished, Rejected, RetryScheduled, TermStarted
from idl.settings import KafkaSettings
from outrider.client.aio import AsyncClient
from outrider.client.client import Client, Handle, JobNotFoundError
from outrider.client.errors import JobCancelledError, JobFailedError, JobRejectedError
from outrider.client.follow import SEED_ENTRIES, Follower
from outrider.client.job import Job
from tests.integration.fake_leader import POOL, QUEUE, FakeLeader, cluster_settings

pytestmark = pytest.mark.kafka
WAIT_S = 20.0


@pytest.fixture
def leader(embedded_settings: KafkaSettings) -> Iterator[FakeLeader]:
    leader = FakeLeader(embedded_settings)
    leader.lead()
    leader.see_node()
    yield leader
    leader.close()


@pytest.fixture
def client(leader: FakeLeader) -> Iterator[Client]:
    with Client(cluster_settings(leader.kafka), submitter="tester") as client:
        yield client


def test_a_job_from_submission_to_its_result_bytes(client: Client, leader: FakeLeader) -> None:
    handle = client.submit(Job(["echo", "hi"], id="one", payload=b"in"))
    assert handle.status().phase is None
    assert leader.ingest() == ["one"]
    leader.start("one")
    leader.finish("one", result=b"\x00bytes", stdout=b"hi\n")
    end = handle.wait(WAIT_S)
    assert end.succeeded and end.attempt == 1
    assert handle.result() == b"\x00bytes"
    record = handle.attempt_result()
    assert record is not None and record.stdout_tail == b"hi\n"


def test_a_large_payload_and_a_large_result_go_by_claim_check(
    client: Client, leader: FakeLeader
) -> None:
    handle = client.submit(Job("cat", id="big", payload=b"p" * 200_000))
    leader.ingest()
    leader.start("big")
    leader.finish("big", result=b"r" * 200_000)
    assert handle.result(WAIT_S) == b"r" * 200_000


def test_failure_tells_code_reason_and_every_attempt(client: Client, leader: FakeLeader) -> None:
    handle = client.submit(Job("false", id="bad"))
    leader.ingest()
    leader.start("bad")
    leader.append(
        leader.report("bad", outcome="failed", exit_code=1),
        RetryScheduled(job="bad", attempt=2, reason="failed", not_before_ms=0),
    )
    leader.start("bad", attempt=2)
    leader.append(
        leader.report("bad", attempt=2, outcome="failed", exit_code=7),
        DeadLettered(job="bad", code="AttemptsExhausted", reason="2 attempts failed"),
    )
    with pytest.raises(JobFailedError, match="2 attempts failed") as caught:
        handle.result(WAIT_S)
    assert caught.value.code == "AttemptsExhausted"
    assert [story.exit_code for story in caught.value.attempts] == [1, 7]


def test_cancelled_and_rejected_jobs_raise_their_own_errors(
    client: Client, leader: FakeLeader
) -> None:
    gone, refused = client.submit([Job("a", id="gone"), Job("b", id="refused")])
    leader.ingest()
    leader.append(Cancelled(job="gone", by="ops"))
    with pytest.raises(JobCancelledError, match="ops"):
        gone.result(WAIT_S)
    second = client.submit(Job("c", id="late"))
    place = second._progress.source
    assert place is not None
    leader.append(
        Rejected(queue=QUEUE, source=place, job="late", code="depth", reason="queue is full")
    )
    with pytest.raises(JobRejectedError, match="queue is full"):
        second.wait(WAIT_S)
    assert not refused.done


def refuse(leader: FakeLeader, handle: Handle, code: str = "duplicate") -> None:
    place = handle._progress.source
    assert place is not None
    leader._taken.add(place)
    leader.append(Rejected(queue=QUEUE, source=place, job=handle.job, code=code, reason="told"))


def test_the_second_submission_of_an_id_is_the_first_job(
    client: Client, leader: FakeLeader
) -> None:
    """While it runs, once it has ended, and from a process that knows nothing of the first."""
    first = client.submit(Job("a", id="same"))
    leader.ingest()
    leader.start("same")
    again = client.submit(Job("a", id="same"))
    refuse(leader, again)
    with Client(cluster_settings(leader.kafka)) as other:
        elsewhere = other.submit(Job("a", id="same"))
        refuse(leader, elsewhere)
        leader.finish("same", result=b"once")
        for handle in (first, again, elsewhere):
            assert handle.result(WAIT_S) == b"once"
            assert len(handle.status().attempts) == 1
        late = other.submit(Job("a", id="same"))
        refuse(leader, late)
        assert late.result(WAIT_S) == b"once"
        assert not other._follow()._jobs, "what has ended is not remembered"
    assert not client._follow()._jobs


def test_a_duplicate_of_a_job_that_the_ledger_has_forgotten_is_rejected(
    client: Client, leader: FakeLeader
) -> None:
    handle = client.submit(Job("a", id="old"))
    refuse(leader, handle)
    with pytest.raises(JobRejectedError, match="duplicate"):
        handle.wait(WAIT_S)


def test_a_submission_that_was_corrected_is_another_one(client: Client, leader: FakeLeader) -> None:
    wrong = client.submit(Job("a", id="fix"))
    refuse(leader, wrong, "over-limit")
    with pytest.raises(JobRejectedError):
        wrong.wait(WAIT_S)
    with Client(cluster_settings(leader.kafka)) as early, pytest.raises(JobRejectedError):
        early.job("fix").wait(WAIT_S)
    right = client.submit(Job("a", id="fix"))
    assert not right.done
    assert leader.ingest() == ["fix"]
    leader.start("fix")
    leader.finish("fix", result=b"fixed")
    assert right.result(WAIT_S) == b"fixed"
    with Client(cluster_settings(leader.kafka)) as late:
        assert late.job("fix").result(WAIT_S) == b"fixed"


def test_a_zombies_entries_move_nothing(client: Client, leader: FakeLeader) -> None:
    handle = client.submit(Job("x", id="mine"))
    leader.ingest()
    leader.start("mine")
    successor = FakeLeader(leader.kafka, "c2", term=2)
    successor.lead()
    leader.append(Finished(job="mine", attempt=1))
    successor.append(
        leader.report("mine", outcome="failed", exit_code=3),
        DeadLettered(job="mine", code="AttemptsExhausted", reason="no luck"),
    )
    successor.close()
    assert not handle.wait(WAIT_S).succeeded


def test_a_job_of_long_ago_is_recalled_and_an_unknown_one_is_not(
    leader: FakeLeader, client: Client
) -> None:
    client.send([Job("x", id="old")])
    leader.ingest()
    leader.start("old")
    leader.finish("old", result=b"kept")
    with Client(cluster_settings(leader.kafka)) as later:
        assert later.job("old").result(WAIT_S) == b"kept"
        with pytest.raises(JobNotFoundError):
            later.job("never")


def test_a_follower_that_starts_late_seeds_its_gate_from_the_last_entries(
    leader: FakeLeader,
) -> None:
    for _ in range(SEED_ENTRIES + 10):
        leader.append()
    follower = Follower(cluster_settings(leader.kafka))
    try:
        assert (follower._gate.term, follower._gate.leader) == (1, "c1")
        assert follower._gate.seq == SEED_ENTRIES + 12
        zombie = FakeLeader(leader.kafka, "c9", term=1)
        zombie.append(TermStarted(pool=POOL, previous_term=0))
        zombie.close()
        progress = follower.watch("later")
        with Client(cluster_settings(leader.kafka)) as client:
            (sent,) = client.send([Job("x", id="later")])
        follower.begin([(progress, sent.source)])
        leader.ingest()
        leader.append(Cancelled(job="later"))
        assert progress.ended.result(WAIT_S).phase == "cancelled"
    finally:
        follower.close()


def test_many_jobs_keep_their_order_and_end_as_they_end(client: Client, leader: FakeLeader) -> None:
    handles = client.submit(Job("x", id=f"m-{index}") for index in range(50))
    assert [handle.job for handle in handles] == [f"m-{index}" for index in range(50)]
    leader.ingest()
    leader.append(*(Cancelled(job=handle.job) for handle in reversed(handles)))
    assert {handle.job for handle in client.as_ended(handles, WAIT_S)} == {
        handle.job for handle in handles
    }
    with pytest.raises(TimeoutError, match="1 job has not ended"):
        list(client.as_ended([client.submit(Job("x"))], timeout=0.01))


def test_an_unknown_queue_is_refused_before_anything_is_sent(client: Client) -> None:
    with pytest.raises(ConfigError, match="queue 'nowhere' is not in the cluster file"):
        client.submit(Job("x", queue="nowhere"))


async def test_the_async_client_has_the_same_names(leader: FakeLeader) -> None:
    import asyncio

    async with AsyncClient(cluster_settings(leader.kafka)) as client:
        handle = await client.submit(Job("x", id="async"))
        await asyncio.to_thread(leader.ingest)
        await asyncio.to_thread(leader.start, "async")
        await asyncio.to_thread(leader.finish, "async", 1, b"value")
        assert await handle.result(WAIT_S) == b"value"
        assert (await handle.wait()).succeeded and handle.done
        waiting = await client.submit(Job("x"))
        with pytest.raises(TimeoutError):
            await waiting.wait(0.01)
