"""Following a job's logs ends with the job, with the client, and with whoever wanted them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import outrider.client.client
from idl.records import LogChunk
from idl.settings import ClusterSettings, KafkaSettings
from outrider.client.aio import AsyncHandle
from outrider.client.client import Client, Handle
from outrider.client.progress import JobProgress

NOWHERE = KafkaSettings(bootstrap="127.0.0.1:1")
GIVEN_UP_S = 20.0
"""A reader that nobody stops would stay for ever: the test fails instead."""


class EndlessLog:
    """Stands for `read_logs`: two chunks, then nothing more until it is told to stop."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.ended: list[str] = []

    def __call__(
        self, *_place: object, stop: Callable[[], bool] | None = None, **_: object
    ) -> Iterator[LogChunk]:
        for seq in range(2):
            yield LogChunk(job="j", attempt=1, seq=seq, stream="stdout", at_ms=0, data=b"x")
        if stop is None:
            self.ended.append("read to the end")
            return
        deadline = time.monotonic() + GIVEN_UP_S
        self.waiting.set()
        while not stop():
            if time.monotonic() > deadline:
                self.ended.append("nobody stopped it")
                return
            time.sleep(0.005)
        self.ended.append("stopped")


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> EndlessLog:
    log = EndlessLog()
    monkeypatch.setattr(outrider.client.client, "read_logs", log)
    return log


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(ClusterSettings(cluster="none", kafka=NOWHERE)) as found:
        yield found


async def follow(client: Client, read: list[int]) -> None:
    handle = AsyncHandle(client, Handle(client, JobProgress("j")))
    async for chunk in handle.logs(follow=True):
        read.append(chunk.seq)


def test_a_cancelled_follower_lets_its_thread_go(client: Client, endless: EndlessLog) -> None:
    """asyncio.run joins the threads of its executor: one that stays hangs the program."""
    read: list[int] = []

    async def main() -> None:
        task = asyncio.create_task(follow(client, read))
        await asyncio.to_thread(endless.waiting.wait, GIVEN_UP_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert read == [0, 1]
    assert endless.ended == ["stopped"]


def test_a_closed_client_ends_its_followers(client: Client, endless: EndlessLog) -> None:
    read: list[Any] = []
    handle = Handle(client, JobProgress("j"))
    thread = threading.Thread(target=lambda: read.extend(handle.logs(follow=True)))
    thread.start()
    assert endless.waiting.wait(GIVEN_UP_S)
    client.close()
    thread.join(2 * GIVEN_UP_S)
    assert [chunk.seq for chunk in read] == [0, 1]
    assert endless.ended == ["stopped"]


def test_without_following_everything_is_read_once(client: Client, endless: EndlessLog) -> None:
    handle = Handle(client, JobProgress("j"))
    assert [chunk.seq for chunk in handle.logs()] == [0, 1]
    assert endless.ended == ["read to the end"]
