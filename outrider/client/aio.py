"""`AsyncClient`: the same names as `Client`, as coroutines.

Blocking calls (produce and wait for acknowledgement, fetch a result) run in the loop's default
executor; waiting for a job's end takes no thread, however many jobs are waited for.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from idl.jobs import SourceRef
from idl.records import AttemptResult, LogChunk
from idl.settings import ClusterSettings
from outrider.client.client import Client, Handle
from outrider.client.function import function_jobs, function_value
from outrider.client.job import Job, Submission
from outrider.client.progress import JobEnd, JobStatus


class AsyncHandle:
    """One submitted job, awaited."""

    __slots__ = ("_client", "_handle", "job")

    def __init__(self, client: Client, handle: Handle) -> None:
        self._client = client
        self._handle = handle
        self.job = handle.job

    def __repr__(self) -> str:
        return f"<Async{repr(self._handle)[1:]}"

    @property
    def done(self) -> bool:
        """The job ended."""
        return self._handle.done

    def status(self) -> JobStatus:
        """Phase, node, attempts as far as the ledger was read."""
        return self._handle.status()

    async def wait(self, timeout: float | None = None) -> JobEnd:  # noqa: ASYNC109 - as in Client
        """As `Handle.wait`; cancelling the wait does not cancel the job."""
        future = asyncio.shield(asyncio.wrap_future(self._handle.ended))
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise TimeoutError(f"job {self.job} has not ended{self._client.stall_note()}") from None

    async def result(self, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as in Client
        """As `Handle.result`."""
        end = await self.wait(timeout)
        error = end.error()
        if error is not None:
            raise error
        return await asyncio.to_thread(self._client.result_of, end)

    async def output(self, name: str) -> bytes:
        """As `Handle.output`."""
        await self.wait()
        return await asyncio.to_thread(self._handle.output, name)

    async def attempt_result(self) -> AttemptResult | None:
        """As `Handle.attempt_result`."""
        source = (await self.wait()).source
        if source is None:
            return None
        return await asyncio.to_thread(self._client.read_result, source)

    async def logs(
        self, *, attempt: int | None = None, follow: bool = False
    ) -> AsyncIterator[LogChunk]:
        """As `Handle.logs`; a loop that is cancelled, timed out or left lets its thread go."""
        abandoned = threading.Event()
        chunks = self._handle.logs_until(abandoned.is_set, attempt=attempt, follow=follow)
        try:
            while (chunk := await asyncio.to_thread(_next, chunks)) is not None:
                yield chunk
        finally:
            abandoned.set()

    async def cancel(self) -> None:
        """As `Handle.cancel`."""
        await asyncio.to_thread(self._handle.cancel)


def _next(chunks: Iterator[LogChunk]) -> LogChunk | None:
    return next(chunks, None)


class AsyncClient:
    """`async with AsyncClient() as client: …`; arguments as `Client`."""

    def __init__(
        self, config: str | Path | ClusterSettings | None = None, *, submitter: str = ""
    ) -> None:
        self._client = Client(config, submitter=submitter)

    @property
    def settings(self) -> ClusterSettings:
        """The cluster it talks to."""
        return self._client.settings

    @overload
    async def submit(self, jobs: Job | Submission) -> AsyncHandle: ...
    @overload
    async def submit(self, jobs: Iterable[Job | Submission]) -> list[AsyncHandle]: ...

    async def submit(
        self, jobs: Job | Submission | Iterable[Job | Submission]
    ) -> AsyncHandle | list[AsyncHandle]:
        """As `Client.submit`."""
        if isinstance(jobs, Job | Submission):
            return AsyncHandle(self._client, await asyncio.to_thread(self._client.submit, jobs))
        handles = await asyncio.to_thread(self._client.submit, list(jobs))
        return [AsyncHandle(self._client, handle) for handle in handles]

    async def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], **options: Any
    ) -> list[Any]:
        """As `Client.map`, all values at once."""
        handles = await self.submit(function_jobs(function, items, **options))
        return [
            function_value(value) for value in await asyncio.gather(*(h.result() for h in handles))
        ]

    async def job(self, job: str) -> AsyncHandle:
        """As `Client.job`."""
        return AsyncHandle(self._client, await asyncio.to_thread(self._client.job, job))

    async def cancel(self, job: str) -> SourceRef:
        """As `Client.cancel`."""
        return await asyncio.to_thread(self._client.cancel, job)

    async def close(self) -> None:
        """As `Client.close`."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.close()
