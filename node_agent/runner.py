"""One attempt, from its payload to its result in Kafka: fetch, run, stream output, deliver.

Every way to end is a result record: the job's fault, the platform's fault, or our order to stop.
A result is delivered however long Kafka is away (DESIGN, idea 7).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Literal

from msgspec.structs import replace

from dataplane.logs import AttemptLog
from dataplane.payloads import PayloadFetcher
from dataplane.process import now_ms
from dataplane.producer import RecordProducer
from dataplane.results import write_result
from idl.control import AssignIntent
from idl.errors import JobFaultError, PlatformFaultError
from idl.ids import Attempt, JobId
from idl.jobs import SourceRef
from idl.limits import OUTPUT_TAIL_BYTES
from idl.records import AttemptResult
from idl.settings import KafkaSettings
from node_agent.core.attempts import AttemptEnded, AttemptRunning, Event, ResultDelivered
from node_agent.core.gpus import GpuDevices
from node_agent.core.results import plan_of, result_of
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxError, SandboxOutcome

DELIVERY_RETRY_S: Final = 1.0
"""Between tries to deliver a result to a Kafka that is away; there is no last try."""

log = logging.getLogger(__name__)


class _Output:
    """What a job writes: to the log topic as it comes, and its tails for the result."""

    def __init__(self, attempt_log: AttemptLog) -> None:
        self._log = attempt_log
        self._chunks: asyncio.Queue[tuple[Literal["stdout", "stderr"], bytes, int] | None] = (
            asyncio.Queue()
        )
        self._pump: asyncio.Task[None] | None = None
        self.tails: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self.lost = ""

    def take(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Called by the sandbox; its caps bound the queue."""
        self.tails[stream] = (self.tails[stream] + data)[-OUTPUT_TAIL_BYTES:]
        self._chunks.put_nowait((stream, data, now_ms()))
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._write())

    async def close(self) -> SourceRef | None:
        """Waits until all is written; where the first chunk is."""
        if self._pump is not None:
            self._chunks.put_nowait(None)
            await self._pump
        return self._log.first

    async def _write(self) -> None:
        while (chunk := await self._chunks.get()) is not None:
            if self.lost:
                continue
            try:
                await self._log.write(*chunk)
            except PlatformFaultError as error:
                self.lost = f"output lost: {error}"


class AttemptRunner:
    """Runs attempts concurrently; `tell` hands their facts to the core."""

    def __init__(
        self,
        settings: KafkaSettings,
        node: str,
        sandbox: NativeSandbox,
        gpus: GpuDevices,
        producer: RecordProducer,
        fetcher: PayloadFetcher,
        tell: Callable[[Event], None],
        ended: Callable[[AttemptResult], None],
    ) -> None:
        self._settings = settings
        self._node = node
        self._sandbox = sandbox
        self._gpus = gpus
        self._producer = producer
        self._fetcher = fetcher
        self._tell = tell
        self._ended = ended
        self._killed: dict[tuple[str, int], str] = {}

    async def kill(self, job: str, attempt: int, why: str) -> None:
        """Ends the attempt now, or before it starts."""
        self._killed[job, attempt] = why
        await self._sandbox.kill(f"{job}.{attempt}", why)

    async def run(self, assign: AssignIntent, term: int) -> None:
        """The whole attempt; returns once its result is in Kafka."""
        assigned_ms = now_ms()
        output = _Output(
            AttemptLog(self._producer, self._settings, JobId(assign.job), Attempt(assign.attempt))
        )
        started_ms = 0

        def started() -> None:
            nonlocal started_ms
            started_ms = now_ms()
            self._tell(AttemptRunning(assign.job, assign.attempt))

        outcome = await self._execute(assign, output, started)
        place = await output.close()
        killed = self._killed.pop((assign.job, assign.attempt), "")
        detail = killed if outcome.cause == "killed" else ""
        result = replace(
            result_of(assign, self._node, term, outcome, detail),
            assigned_ms=assigned_ms,
            started_ms=started_ms,
            ended_ms=now_ms(),
            stdout_tail=output.tails["stdout"],
            stderr_tail=output.tails["stderr"],
            log=place,
        )
        if output.lost:
            result = replace(result, output_truncated=True)
            log.warning("output lost", extra={"job": assign.job, "reason": output.lost})
        self._tell(AttemptEnded(assign.job, assign.attempt))
        await self.deliver(result)

    async def refuse(self, assign: AssignIntent, term: int, detail: str) -> None:
        """A result for an attempt that must not run here."""
        self._tell(AttemptEnded(assign.job, assign.attempt))
        outcome = SandboxOutcome(cause="sandbox_failed", detail=detail)
        result = result_of(assign, self._node, term, outcome)
        await self.deliver(replace(result, assigned_ms=now_ms(), ended_ms=now_ms()))

    async def deliver(self, result: AttemptResult) -> None:
        """Writes the result, however long it takes."""
        self._ended(result)
        while True:
            try:
                await write_result(self._producer, self._settings, result)
            except JobFaultError as error:
                result = replace(result, outcome="failed", detail=str(error), result=None)
            except PlatformFaultError as error:
                log.warning("result not delivered yet", extra={"reason": str(error)})
                await asyncio.sleep(DELIVERY_RETRY_S)
            else:
                self._tell(ResultDelivered(result.job, result.attempt))
                return

    async def _execute(
        self, assign: AssignIntent, output: _Output, started: Callable[[], None]
    ) -> SandboxOutcome:
        key = (assign.job, assign.attempt)
        try:
            payload = b""
            if assign.payload is not None:
                payload = await self._fetcher.fetch(assign.payload)
            if key in self._killed:
                return SandboxOutcome(cause="killed")
            return await self._sandbox.run(
                plan_of(assign, self._node, self._gpus), payload, output.take, started
            )
        except JobFaultError as error:
            return SandboxOutcome(cause="exited", exit_code=None, detail=str(error))
        except (PlatformFaultError, SandboxError) as error:
            return SandboxOutcome(cause="sandbox_failed", detail=str(error))
