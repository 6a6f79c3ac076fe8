"""One attempt, from its payload to its result in Kafka: fetch, run, stream output, deliver.

Every way to end is a result record: the job's fault, the platform's fault, or our order to stop.
A result is delivered however long Kafka is away (DESIGN, idea 7). Each step is in the journal
before it is taken, so that the agent's next process can go on from there (ADR 0006).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

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
from idl.topics import TopicNames
from node_agent.core.attempts import (
    LEASE_RAN_OUT,
    AttemptEnded,
    AttemptRunning,
    Event,
    ResultDelivered,
)
from node_agent.core.gpus import ALREADY_GIVEN, GpuDevices
from node_agent.core.images import ReadyImage
from node_agent.core.journal import Delivered, Ended, Entry, Launching, Record, Started
from node_agent.core.recovery import sandbox_key
from node_agent.core.results import plan_of, result_of
from node_agent.files import JobFiles, OutputCollection
from node_agent.images.offer import NodeImages
from node_agent.keeper import LauncherKeeper
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import (
    Cause,
    CommandRefused,
    SandboxError,
    SandboxOutcome,
    SandboxUnavailable,
)
from node_agent.spool import Piece, Spool, Stream

DELIVERY_RETRY_S: Final = 1.0
"""Between tries to deliver a result to a Kafka that is away; there is no last try."""

CATCH_UP_LOOK_S: Final = 1.0
"""How often to look whether a disk that was full has taken what only this process knew."""

DISK_FULL: Final = "the disk of the agent's state directory is full"

log = logging.getLogger(__name__)


class _Output:
    """What a job writes: to its spool and the log topic as it comes, its tails for the result."""

    def __init__(self, attempt_log: AttemptLog, spool: Spool) -> None:
        self._log = attempt_log
        self._spool = spool
        self._spooling = True
        self._chunks: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None
        self.seen: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        self.tails: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}
        self.lost = ""

    def recover(self) -> None:
        """Starts with what an earlier process read: Kafka gets it again, under the same numbers."""
        try:
            pieces = self._spool.recover()
        except OSError as error:
            pieces = []
            log.warning("output of before the restart is lost", extra={"reason": str(error)})
        for piece in pieces:
            self._hand_on(piece)

    def take(self, stream: Stream, data: bytes) -> None:
        """Called by the sandbox; its caps bound queue and spool."""
        piece = Piece(stream, data, now_ms())
        if self._spooling:
            try:
                self._spool.append(piece)
            except OSError as error:
                self._spooling = False
                log.warning("output would not survive a restart", extra={"reason": str(error)})
        self._hand_on(piece)

    def remove(self) -> None:
        """The result is in Kafka, and the output with it."""
        self._spool.remove()

    def leave(self) -> None:
        """Stops; the agent's next process goes on."""
        self._spool.close()
        if self._pump is not None:
            self._pump.cancel()

    def _hand_on(self, piece: Piece) -> None:
        self.seen[piece.stream] += len(piece.data)
        self.tails[piece.stream] = (self.tails[piece.stream] + piece.data)[-OUTPUT_TAIL_BYTES:]
        self._chunks.put_nowait(piece)
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


class RunnerPorts(NamedTuple):
    """What a runner needs of its agent. `record` writes to the journal before it returns; False
    where the disk had no room and only this process knows, which it does while `behind`."""

    keeper: LauncherKeeper
    gpus: GpuDevices
    images: NodeImages
    producer: RecordProducer
    fetcher: PayloadFetcher
    output: Path
    record: Callable[[Record], bool]
    behind: Callable[[], bool]
    entry: Callable[[str, int], Entry]
    tell: Callable[[Event], None]
    ended: Callable[[AttemptResult], None]


class AttemptRunner:
    """Runs attempts concurrently; `tell` hands their facts to the core."""

    def __init__(self, settings: KafkaSettings, node: str, ports: RunnerPorts) -> None:
        self._settings = settings
        self._node = node
        self._ports = ports
        self._files = JobFiles(TopicNames(settings.prefix), ports.fetcher, ports.producer)
        self._killed: dict[tuple[str, int], tuple[Cause, str]] = {}

    async def extend(self, job: str, attempt: int, until_ms: int) -> None:
        """Its lease was renewed."""
        await self._ports.keeper.current.extend_lease(sandbox_key(job, attempt), until_ms)

    async def end_lease(self, job: str, attempt: int) -> None:
        """Its lease is over: it dies, or never starts."""
        self._killed.setdefault((job, attempt), ("lease_over", LEASE_RAN_OUT))
        log.warning("lease ran out", extra={"job": job, "attempt": attempt})
        await self._ports.keeper.current.fence(sandbox_key(job, attempt), LEASE_RAN_OUT)

    async def kill(self, job: str, attempt: int, why: str) -> None:
        """Ends the attempt now, or before it starts."""
        self._killed.setdefault((job, attempt), ("killed", why))
        with contextlib.suppress(SandboxUnavailable):  # the launcher died, and the job with it
            await self._ports.keeper.current.kill(sandbox_key(job, attempt), why)

    async def run(self, assign: AssignIntent) -> None:
        """The whole attempt; returns once its result is in Kafka."""
        output = self._output(assign)
        try:
            outcome, sandbox = await self._execute(assign, output)
            await self._finish(assign, outcome, output, sandbox)
        finally:
            output.leave()

    async def adopt(self, assign: AssignIntent, sandbox: NativeSandbox) -> None:
        """The rest of an attempt that an earlier process launched."""
        output = self._output(assign)
        output.recover()
        plan = plan_of(assign, self._node, ALREADY_GIVEN)
        collection = OutputCollection(self._files, assign)
        try:
            outcome = await sandbox.resume(
                plan,
                dict(output.seen),
                output.take,
                lambda: self._started(assign),
                on_work=collection.take,
            )
            outcome = _with_outputs(outcome, collection)
            await self._finish(assign, outcome, output, sandbox)
        finally:
            output.leave()

    async def refuse(self, assign: AssignIntent, detail: str) -> None:
        """A result for an attempt that must not run here, or is gone."""
        output = self._output(assign)
        output.recover()
        try:
            outcome = SandboxOutcome(cause="sandbox_failed", detail=detail)
            await self._finish(assign, outcome, output, None)
        finally:
            output.leave()

    async def deliver_again(self, assign: AssignIntent) -> None:
        """The result of an attempt that ended before the restart; Kafka may have it already."""
        output = self._output(assign)
        output.recover()
        try:
            await self._report(assign, output)
        finally:
            output.leave()

    # --- steps --------------------------------------------------------------------------------

    def _output(self, assign: AssignIntent) -> _Output:
        attempt_log = AttemptLog(
            self._ports.producer,
            self._settings,
            JobId(assign.job),
            Attempt(assign.attempt),
            assign.spec.limits.output_bytes,
        )
        path = self._ports.output / sandbox_key(assign.job, assign.attempt)
        return _Output(attempt_log, Spool(path))

    def _started(self, assign: AssignIntent) -> None:
        if self._ports.entry(assign.job, assign.attempt).started_ms:
            return  # an earlier process saw it start
        self._ports.record(Started(job=assign.job, attempt=assign.attempt, at_ms=now_ms()))
        self._ports.tell(AttemptRunning(assign.job, assign.attempt))

    async def _execute(
        self, assign: AssignIntent, output: _Output
    ) -> tuple[SandboxOutcome, NativeSandbox | None]:
        key = (assign.job, assign.attempt)
        collection = OutputCollection(self._files, assign)
        try:
            plan_of(assign, self._node, self._ports.gpus)  # raises before anything is fetched
            payload = b""
            if assign.payload is not None:
                payload = await self._ports.fetcher.fetch(assign.payload)
            inputs_fd = await self._files.inputs(assign)
            image = await self._image(assign.spec.image, inputs_fd)
            sandbox = await self._launcher(inputs_fd)
            launch = Launching(job=assign.job, attempt=assign.attempt)
            hindered = self._hindered(key) or self._unwritten(launch)
            if hindered is not None:
                if inputs_fd >= 0:
                    os.close(inputs_fd)
                return hindered, None
            lease_until_ms = self._ports.entry(*key).lease_until_ms
            plan = plan_of(assign, self._node, self._ports.gpus, lease_until_ms, image)
            outcome = await sandbox.run(
                plan,
                payload,
                output.take,
                lambda: self._started(assign),
                keep=True,
                inputs_fd=inputs_fd,
                on_work=collection.take,
            )
        except (JobFaultError, CommandRefused) as error:
            return SandboxOutcome(cause="exited", exit_code=None, detail=str(error)), None
        except (PlatformFaultError, SandboxError, OSError) as error:  # out of descriptors
            return SandboxOutcome(cause="sandbox_failed", detail=str(error)), None
        return _with_outputs(outcome, collection), sandbox

    async def _image(self, name: str, inputs_fd: int) -> ReadyImage | None:
        try:
            return await self._ports.images.get(name)
        except BaseException:
            if inputs_fd >= 0:
                os.close(inputs_fd)
            raise

    async def _launcher(self, inputs_fd: int) -> NativeSandbox:
        """The launcher, last of all: it may be replaced whenever nobody is about to use it."""
        try:
            return await self._ports.keeper.sandbox()
        except BaseException:
            if inputs_fd >= 0:
                os.close(inputs_fd)
            raise

    def _hindered(self, key: tuple[str, int]) -> SandboxOutcome | None:
        if key not in self._killed:
            return None
        cause, why = self._killed[key]
        return SandboxOutcome(cause=cause, detail="" if cause == "killed" else why)

    def _unwritten(self, launch: Launching) -> SandboxOutcome | None:
        """Nothing is launched that the agent's next process would not know of."""
        if self._ports.record(launch):
            return None
        return SandboxOutcome(cause="sandbox_failed", detail=DISK_FULL)

    async def _finish(
        self,
        assign: AssignIntent,
        outcome: SandboxOutcome,
        output: _Output,
        sandbox: NativeSandbox | None,
    ) -> None:
        """Its end is stored here, then the launcher may forget it, then it is reported.

        With a full disk the launcher keeps it until the disk has it after all: the agent's next
        process would find an attempt that was to be launched and is unknown, and run it again.
        """
        _, why = self._killed.pop((assign.job, assign.attempt), ("killed", ""))
        detail = why if outcome.cause == "killed" else ""
        stored = self._ports.record(
            Ended(
                job=assign.job,
                attempt=assign.attempt,
                at_ms=now_ms(),
                outcome=outcome,
                detail=detail,
            )
        )
        key = sandbox_key(assign.job, assign.attempt)
        if sandbox is not None and stored:
            await sandbox.forget(key)
        self._ports.tell(AttemptEnded(assign.job, assign.attempt))
        await self._report(assign, output)
        if sandbox is not None and not stored:
            while self._ports.behind():  # noqa: ASYNC110 - a file: it calls nobody back
                await asyncio.sleep(CATCH_UP_LOOK_S)
            await sandbox.forget(key)

    async def _report(self, assign: AssignIntent, output: _Output) -> None:
        entry = self._ports.entry(assign.job, assign.attempt)
        place = await output.close()
        result = _result(assign, self._node, entry, output, place)
        if output.lost:
            log.warning("output lost", extra={"job": assign.job, "reason": output.lost})
        await self._deliver(result)
        output.remove()

    async def _deliver(self, result: AttemptResult) -> None:
        """Writes the result, however long it takes."""
        self._ports.ended(result)
        while True:
            try:
                await write_result(self._ports.producer, self._settings, result)
            except JobFaultError as error:
                result = replace(result, outcome="failed", detail=str(error), result=None)
            except PlatformFaultError as error:
                log.warning("result not delivered yet", extra={"reason": str(error)})
                await asyncio.sleep(DELIVERY_RETRY_S)
            else:
                self._ports.record(Delivered(job=result.job, attempt=result.attempt))
                self._ports.tell(ResultDelivered(result.job, result.attempt))
                return


def _with_outputs(outcome: SandboxOutcome, collection: OutputCollection) -> SandboxOutcome:
    if not (collection.stored or collection.missing):
        return outcome
    return replace(
        outcome, outputs=tuple(collection.stored), outputs_missing=dict(collection.missing)
    )


def _result(
    assign: AssignIntent, node: str, entry: Entry, output: _Output, place: SourceRef | None
) -> AttemptResult:
    ended = entry.ended
    assert ended is not None, "reported before its end was recorded"
    result = result_of(assign, node, entry.term, ended.outcome, ended.detail)
    return replace(
        result,
        assigned_ms=entry.accepted_ms,
        started_ms=entry.started_ms,
        ended_ms=ended.at_ms,
        stdout_tail=output.tails["stdout"],
        stderr_tail=output.tails["stderr"],
        log=place,
        output_truncated=result.output_truncated or bool(output.lost),
    )
