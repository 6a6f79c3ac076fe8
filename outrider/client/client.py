"""`Client`: submit jobs, follow them to their end, fetch what they wrote.

    from outrider import Client, Job

    with Client() as client:
        handle = client.submit(Job(["echo", "hi"], cpu="100m", timeout="10s"))
        handle.wait(timeout=60)

Submitting is producing to Kafka; ends are learned from the ledger, one tail per client. Kafka holds
whatever the leader does not take in yet; `Client._produce` is the one place where every submission
passes, and where admission states (QueueState) will be obeyed.
"""

import getpass
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, overload

from dataplane.commands import send_command_sync
from dataplane.logs import read_logs
from dataplane.payloads import PayloadFetcher
from dataplane.producer import RecordProducer
from dataplane.results import output_bytes_sync, read_result, result_bytes_sync
from dataplane.submit import Submitted, Submitter
from idl.errors import ConfigError, JobFaultError, OutriderError
from idl.ids import Attempt, JobId, QueueName
from idl.jobs import SourceRef
from idl.records import AttemptResult, CancelJob, LogChunk
from idl.settings import ClusterSettings
from outrider.client.config import find_cluster
from outrider.client.errors import OutputMissingError
from outrider.client.follow import Follower
from outrider.client.job import Job, Submission, identified
from outrider.client.progress import JobEnd, JobProgress, JobStatus

FETCH_THREADS: Final = 8
"""Results fetched at once by `map`: enough to hide a broker's latency."""


class JobNotFoundError(JobFaultError):
    """The ledger has no job of this id."""

    def __init__(self, job: str) -> None:
        super().__init__(
            f"no job {job!r} in the ledger; was it submitted to this cluster, and just now?"
        )
        self.job = job


class Handle:
    """One submitted job. Cheap; hold thousands. Methods may be called from any thread."""

    __slots__ = ("_client", "_progress", "job")

    def __init__(self, client: "Client", progress: JobProgress) -> None:
        self._client = client
        self._progress = progress
        self.job = progress.job

    def __repr__(self) -> str:
        phase = self._progress.phase
        return f"<Handle {self.job} {phase if phase else 'submitted'}>"

    @property
    def ended(self) -> "Future[JobEnd]":
        """Resolves when the job ends, for `concurrent.futures.wait` and the like."""
        return self._progress.ended

    @property
    def done(self) -> bool:
        """The job ended."""
        return self._progress.ended.done()

    def status(self) -> JobStatus:
        """Phase, node, attempts as far as the ledger was read (milliseconds ago)."""
        return self._progress.status()

    def wait(self, timeout: float | None = None) -> JobEnd:
        """Waits (seconds) until the job ended, however it ended.

        Raises TimeoutError, JobRejectedError, PlatformFaultError (the ledger is lost to us).
        """
        try:
            return self._progress.ended.result(timeout)
        except TimeoutError:
            raise TimeoutError(
                f"job {self.job} has not ended within {timeout:g} s"
                f"{self._client.stall_note()}; `outrider why {self.job}` tells more"
            ) from None

    def result(self, timeout: float | None = None) -> bytes:
        """Waits and returns what the job wrote to $OUTRIDER_RESULT (b"" where it wrote nothing).

        Raises JobFailedError, JobCancelledError, JobRejectedError, TimeoutError.
        """
        end = self.wait(timeout)
        error = end.error()
        if error is not None:
            raise error
        return self._client.result_of(end)

    def attempt_result(self, timeout: float | None = None) -> AttemptResult | None:
        """The last attempt's record: outcome, usage, output tails. None where it wrote none."""
        source = self.wait(timeout).source
        return None if source is None else self._client.read_result(source)

    def output(self, name: str, timeout: float | None = None) -> bytes:
        """Waits and returns one collected file of a job that succeeded.

        Raises as `result`, and OutputMissingError: it was not asked for, or not there.
        """
        end = self.wait(timeout)
        error = end.error()
        if error is not None:
            raise error
        record = None if end.source is None else self._client.read_result(end.source)
        return self._client.output_bytes(record, name)

    def logs(self, *, attempt: int | None = None, follow: bool = False) -> Iterator[LogChunk]:
        """stdout and stderr in chunks, of one attempt or of all. `follow`: until the job ended, or
        the client is closed."""
        return self.logs_until(lambda: False, attempt=attempt, follow=follow)

    def logs_until(
        self, abandoned: Callable[[], bool], *, attempt: int | None = None, follow: bool = False
    ) -> Iterator[LogChunk]:
        """As `logs`, for a reader in another thread: ends soon after `abandoned()` is true."""

        def left() -> bool:
            return self._client.closed or abandoned()

        seen: set[tuple[int, int]] = set()
        if follow:
            chunks = self._client.logs(self.job, attempt=attempt, stop=lambda: self.done or left())
            for chunk in chunks:
                seen.add((chunk.attempt, chunk.seq))
                yield chunk
            if left():
                return
        for chunk in self._rest(attempt):
            if (chunk.attempt, chunk.seq) not in seen:
                yield chunk

    def _rest(self, attempt: int | None) -> Iterator[LogChunk]:
        """What is in Kafka now; for an attempt that ended, from the place that its result names."""
        stories = self._progress.status().attempts
        source = next((s.result for s in stories if s.attempt == attempt), None)
        if source is None:
            return self._client.logs(self.job, attempt=attempt)
        start = self._client.read_result(source).log
        if start is None:
            return iter(())
        return self._client.logs(self.job, attempt=attempt, start=start)

    def cancel(self) -> None:
        """Asks for the job's end; returns once the order is in Kafka, not once it ended."""
        self._client.cancel(self.job)


class Client:
    """A connection to one cluster. Safe from any thread; use it as a context manager.

    `config`: a cluster file, its settings, or None: `$OUTRIDER_CONFIG`, else the local cluster.
    Raises ConfigError, BrokerUnavailableError.
    """

    def __init__(
        self, config: str | Path | ClusterSettings | None = None, *, submitter: str = ""
    ) -> None:
        self.settings = find_cluster(config)
        self.submitter = submitter or default_submitter()
        self.closed = False
        """Set by `close`: whoever follows something from another thread ends."""
        self._lock = threading.Lock()
        self._follower: Follower | None = None
        self._producer = RecordProducer(self.settings.kafka, name="client")
        self._submitter = Submitter(
            self.settings.kafka, producer=self._producer, submitter=self.submitter
        )

    # -- submitting ----------------------------------------------------------------------------

    @overload
    def submit(self, jobs: Job | Submission) -> Handle: ...
    @overload
    def submit(self, jobs: Iterable[Job | Submission]) -> list[Handle]: ...

    def submit(self, jobs: Job | Submission | Iterable[Job | Submission]) -> Handle | list[Handle]:
        """Submits one job or many; returns once Kafka has them all (`acks=all`).

        A job whose id was submitted before is refused by the leader, and its handle is of the first
        one: ids make retries of a submission safe. Raises ConfigError, InvalidRecordError (the
        job), PlatformFaultError.
        """
        if isinstance(jobs, Job | Submission):
            return self._submit([jobs])[0]
        return self._submit(list(jobs))

    def _submit(self, jobs: Sequence[Job | Submission]) -> list[Handle]:
        whole = self._prepared(jobs)
        follower = self._follow()
        progress = [follower.watch(submission.spec.id) for submission in whole]
        try:
            places = self._produce(whole)
        except BaseException:
            for one in progress:
                follower.forget(one)
            raise
        follower.begin(zip(progress, (place.source for place in places), strict=True))
        return [Handle(self, one) for one in progress]

    def send(self, jobs: Iterable[Job | Submission]) -> list[Submitted]:
        """Submits jobs without following them: their ids and places, in order of `jobs`.

        Raises as `submit`.
        """
        return self._produce(self._prepared(list(jobs)))

    def _prepared(self, jobs: Sequence[Job | Submission]) -> list[Submission]:
        whole = [identified(job.submission() if isinstance(job, Job) else job) for job in jobs]
        self._refuse_unknown_queues({submission.queue for submission in whole})
        return whole

    def _produce(self, whole: Sequence[Submission]) -> list[Submitted]:
        places: dict[int, Submitted] = {}
        for queue in dict.fromkeys(submission.queue for submission in whole):
            chosen = [i for i, submission in enumerate(whole) if submission.queue == queue]
            sent = self._submitter.submit_many_sync(queue, (whole[i].spec for i in chosen))
            places.update(zip(chosen, sent, strict=True))
        return [places[index] for index in range(len(whole))]

    def _refuse_unknown_queues(self, queues: set[QueueName]) -> None:
        for queue in queues - self.settings.queues.keys():
            known = ", ".join(sorted(self.settings.queues))
            raise ConfigError(f"queue {queue!r} is not in the cluster file (there: {known})")

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], **options: Any
    ) -> Iterator[Any]:
        """Runs `function(item)` as one job per item; yields the values in order of `items`.

        The function's source travels, items and values as JSON (`outrider.client.function`).
        `options` are fields of `Job`, and `python` the interpreter on the nodes.
        """
        from outrider.client.function import function_jobs, function_value

        handles = self.submit(function_jobs(function, items, **options))
        with ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="map") as pool:
            for value in pool.map(Handle.result, handles):
                yield function_value(value)

    # -- following -----------------------------------------------------------------------------

    def _follow(self) -> Follower:
        with self._lock:
            if self._follower is None:
                self._follower = Follower(self.settings)
            return self._follower

    def job(self, job: str) -> Handle:
        """A job that somebody submitted, now or long ago: reads the ledger once from its start.

        Raises JobNotFoundError, BrokerUnavailableError.
        """
        progress = self._follow().recall(job)
        if progress is None:
            raise JobNotFoundError(job)
        return Handle(self, progress)

    def as_ended(self, handles: Iterable[Handle], timeout: float | None = None) -> Iterator[Handle]:
        """Yields handles as their jobs end. Raises TimeoutError after `timeout` seconds in all."""
        waiting = {handle.ended: handle for handle in handles}
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended, _ = wait(waiting, left, FIRST_COMPLETED)
            if not ended:
                many = "jobs have" if len(waiting) > 1 else "job has"
                raise TimeoutError(f"{len(waiting)} {many} not ended{self.stall_note()}")
            for future in ended:
                yield waiting.pop(future)

    def stall_note(self) -> str:
        """ " (Kafka stalled: …)" while no broker answers, else empty: for messages."""
        follower = self._follower
        return f" (Kafka stalled: {follower.stalled})" if follower and follower.stalled else ""

    # -- what jobs wrote -----------------------------------------------------------------------

    @cached_property
    def _fetcher(self) -> PayloadFetcher:
        return PayloadFetcher(self.settings.kafka)

    def read_result(self, source: SourceRef) -> AttemptResult:
        """The result record at this place. Raises InvalidRecordError, PlatformFaultError."""
        return read_result(self.settings.kafka, source)

    def result_of(self, end: JobEnd) -> bytes:
        """The result bytes of a job that succeeded."""
        if end.source is None:
            return b""
        return self.bytes_of(self.read_result(end.source))

    def bytes_of(self, result: AttemptResult) -> bytes:
        """A result's own bytes, inline or fetched by claim check."""
        return result_bytes_sync(result, self.settings.kafka, self._fetcher) or b""

    def output_bytes(self, result: AttemptResult | None, name: str) -> bytes:
        """One collected file of a result record. Raises OutputMissingError."""
        for output in result.outputs if result is not None else ():
            if output.name == name:
                return output_bytes_sync(output, self.settings.kafka, self._fetcher)
        raise OutputMissingError(name, result)

    def logs(
        self,
        job: str,
        *,
        attempt: int | None = None,
        start: SourceRef | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[LogChunk]:
        """Chunks of a job's output; with `stop`, waits for more until it says so."""
        number = None if attempt is None else Attempt(attempt)
        return read_logs(self.settings.kafka, JobId(job), attempt=number, start=start, stop=stop)

    def cancel(self, job: str) -> SourceRef:
        """Orders a job's end; returns the order's place in `commands`."""
        now = time.time_ns() // 1_000_000
        return send_command_sync(
            self._producer, self.settings.kafka, CancelJob(job=job), by=self.submitter, at_ms=now
        )

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Flushes, stops following. Idempotent; handles not ended never resolve."""
        self.closed = True
        self._submitter.close()
        self._producer.close()
        if self._follower is not None:
            self._follower.close()
        if "_fetcher" in self.__dict__:
            self._fetcher.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def default_submitter() -> str:
    """`user@host`, as far as they are known: who a job or a command says it is from."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such uid in the user database, as in many containers
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


__all__ = ["Client", "Handle", "JobNotFoundError", "OutriderError"]
