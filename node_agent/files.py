"""A job's files on their way: inputs from Kafka into sealed memory, outputs from disk to Kafka.

Both are bounded in memory by how many jobs are served at once; the others wait for their turn.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from dataplane.payloads import PayloadFetcher, put_payload
from dataplane.producer import RecordProducer
from idl.control import AssignIntent
from idl.errors import JobFaultError, PlatformFaultError
from idl.jobs import JobInput, PayloadLocation, SourceRef
from idl.limits import OUTPUT_FILES_INLINE_BYTES_MAX
from idl.records import OutputFile
from idl.topics import TopicNames
from node_agent.sandbox import outputs
from node_agent.sandbox.streams import pack

JOBS_AT_ONCE: Final = 2
"""Jobs whose files are in memory at once: at most 2 × INPUTS_BYTES_MAX, and 2 × RESULT_BYTES_MAX
of outputs, which go one by one."""
RETRY_S: Final = 1.0
"""Between tries to store an output in a Kafka that is away; there is no last try (as results)."""

log = logging.getLogger(__name__)


class JobFiles:
    """Fetches inputs and stores outputs of one agent's jobs."""

    def __init__(
        self, topics: TopicNames, fetcher: PayloadFetcher, producer: RecordProducer
    ) -> None:
        self._topics, self._fetcher, self._producer = topics, fetcher, producer
        self._fetching = asyncio.Semaphore(JOBS_AT_ONCE)
        self._storing = asyncio.Semaphore(JOBS_AT_ONCE)

    async def inputs(self, assign: AssignIntent) -> int:
        """A descriptor of memory with the job's inputs in the order of its spec; -1: it has none.

        Raises JobFaultError (a claim check that does not hold), PlatformFaultError.
        """
        wanted = assign.spec.inputs.values()
        if not wanted:
            return -1
        async with self._fetching:
            parts = await asyncio.gather(*(self._bytes(given) for given in wanted))
            try:
                return await asyncio.to_thread(pack, parts)
            except OSError as error:
                raise PlatformFaultError(f"no memory for the job's inputs: {error}") from error

    async def _bytes(self, given: JobInput) -> bytes:
        if given.ref is None:
            return given.data or b""
        ref = given.ref
        source = SourceRef(topic=self._topics.payloads, partition=ref.partition, offset=ref.offset)
        return await self._fetcher.fetch(
            PayloadLocation(
                source=source, size_bytes=ref.size_bytes, inline=False, sha256=ref.sha256
            )
        )


class OutputCollection:
    """The outputs of one attempt, once it has ended: `take` is what the sandbox calls."""

    def __init__(self, files: JobFiles, assign: AssignIntent) -> None:
        self._files, self._assign = files, assign
        self.stored: list[OutputFile] = []
        self.missing: dict[str, str] = {}
        self._inline_left = OUTPUT_FILES_INLINE_BYTES_MAX

    @property
    def take(self) -> Callable[[int], Awaitable[None]] | None:
        """None where the job names no outputs."""
        return self._take if self._assign.spec.outputs else None

    async def _take(self, work_fd: int) -> None:
        """What cannot be had is missing, whatever the reason: the job is over, and the agent's next
        process would find the same."""
        wanted = self._assign.spec.outputs
        async with self._files._storing:
            try:
                listing = await asyncio.to_thread(outputs.find, work_fd, wanted)
            except OSError as error:
                why = error.strerror or "cannot be looked for"
                listing = outputs.Listing((), dict.fromkeys(map(outputs.escaped, wanted), why))
            self.missing = listing.missing
            for found in listing.files:
                try:
                    data = await asyncio.to_thread(outputs.read, work_fd, found)
                except OSError as error:
                    self.missing[found.name] = error.strerror or "cannot be read"
                else:
                    await self._keep(found.name, data)

    async def _keep(self, name: str, data: bytes) -> None:
        try:
            self.stored.append(await self._store(name, data))
        except JobFaultError as error:  # this Kafka takes no record of that size
            self.missing[name] = str(error)

    async def _store(self, name: str, data: bytes) -> OutputFile:
        if len(data) <= self._inline_left:
            self._inline_left -= len(data)
            digest = hashlib.sha256(data).hexdigest()
            return OutputFile(name=name, size_bytes=len(data), sha256=digest, data=data)
        while True:
            try:
                topic = self._files._topics.payloads
                ref = await put_payload(self._files._producer, topic, self._assign.job, data)
            except PlatformFaultError as error:
                log.warning("output not stored yet", extra={"reason": str(error)})
                await asyncio.sleep(RETRY_S)
            else:
                return OutputFile(name=name, size_bytes=len(data), sha256=ref.sha256, ref=ref)
