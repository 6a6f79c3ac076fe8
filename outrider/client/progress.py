"""One job as its submitter follows it: valid ledger decisions in, phase and end out. Pure.

Smaller than `dataplane.core.state.PoolState` on purpose: a client follows its own jobs and may
start in the middle of the ledger, where a whole pool cannot be folded.
"""

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import msgspec

from dataplane.core.jobs import Phase
from dataplane.core.state import DUPLICATE_CODE
from idl.errors import OutriderError
from idl.jobs import SourceRef
from idl.ledger import (
    Assigned,
    Cancelled,
    DeadLettered,
    Decision,
    Finished,
    Ingested,
    LeaseAwaited,
    Rejected,
    Released,
    RetryScheduled,
    Started,
    Waiting,
)
from idl.records import AttemptStory
from outrider.client.errors import (
    JobCancelledError,
    JobEndedError,
    JobFailedError,
    JobRejectedError,
)


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job at one moment. `phase` is None until a leader has read the submission."""

    job: str
    phase: Phase | None
    attempt: int = 0
    node: str = ""
    why: str = ""
    attempts: tuple[AttemptStory, ...] = ()


class JobEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended. `source`: the result record of the last attempt, where it wrote one."""

    job: str
    phase: Phase
    at_ms: int
    attempt: int
    code: str = ""
    reason: str = ""
    attempts: tuple[AttemptStory, ...] = ()

    @property
    def source(self) -> SourceRef | None:
        """The result record of the last attempt."""
        return self.attempts[-1].result if self.attempts else None

    @property
    def succeeded(self) -> bool:
        """True where the job has its one result."""
        return self.phase is Phase.FINISHED

    def error(self) -> JobEndedError | None:
        """What `result()` raises; None where the job succeeded."""
        if self.succeeded:
            return None
        if self.phase is Phase.CANCELLED:
            return JobCancelledError(self.job, self.reason)
        return JobFailedError(self.job, self.code, self.reason, self.attempts)


class JobProgress:
    """Mutated by `apply` alone, under its follower's lock. `ended` resolves once.

    It gets a `JobEnd`, or raises JobRejectedError (nothing of it ran) or PlatformFaultError (the
    ledger cannot be followed any more).
    """

    __slots__ = (
        "_node", "_refusal", "attempt", "attempts", "ended", "found", "held", "job", "next_offset",
        "phase", "source", "taken", "why",
    )  # fmt: skip

    def __init__(self, job: str) -> None:
        self.job = job
        self.phase: Phase | None = None
        self.attempt = 0
        self.why = ""
        self.attempts: list[AttemptStory] = []
        self.ended: Future[JobEnd] = Future()
        self.next_offset = 0
        """Decisions below it were applied already."""
        self.held: list[tuple[int, int, Decision]] | None = None
        """Decisions that arrived while the ledger's past is still being read."""
        self.source: SourceRef | None = None
        """This submission's own record; None for a job that somebody else submitted."""
        self.taken = False
        """The submission was refused, because its id is another's: this job is that one."""
        self.found = False
        """That one was looked for in the ledger's past."""
        self._refusal: Rejected | None = None
        self._node = ""

    def status(self) -> JobStatus:
        """What is known now."""
        return JobStatus(
            job=self.job, phase=self.phase, attempt=self.attempt, node=self._node, why=self.why,
            attempts=tuple(self.attempts),
        )  # fmt: skip

    def apply(self, at_ms: int, decision: Decision) -> None:
        """Takes one valid decision about this job."""
        match decision:
            case Ingested():
                self.phase = Phase.PENDING
            case Rejected():
                self._rejected(decision)
            case Waiting():
                self.why = f"{decision.code}: {decision.message}"
            case Assigned():
                self.phase, self.why = Phase.ASSIGNED, ""
                self.attempt, self._node = decision.attempt, decision.node
            case Started():
                self.phase = Phase.RUNNING
            case LeaseAwaited():
                self.why = f"attempt {decision.attempt} is given up, its lease is waited for"
            case Released():
                self.why = ""
                self.attempts.append(_story(decision, self._node))
            case RetryScheduled():
                self.phase, self.why = Phase.BACKING_OFF, decision.reason
            case Finished():
                self._end(Phase.FINISHED, at_ms)
            case DeadLettered():
                self._end(Phase.DEAD, at_ms, decision.code, decision.reason)
            case Cancelled():
                self._end(Phase.CANCELLED, at_ms, "cancelled", decision.by)

    def _rejected(self, rejected: Rejected) -> None:
        """Another submission under the same id is refused without touching this job."""
        if self.source is None:
            self._refusal = rejected  # somebody's; ours where nothing else is known of the id
        elif self.source == rejected.source:
            self._refusal = rejected
            self.taken = rejected.code == DUPLICATE_CODE
            if not self.taken:
                self.refuse()

    def refuse(self) -> bool:
        """Ends it by the refusal that was told; False where none was."""
        refusal = self._refusal
        if refusal is not None:
            self.fail(JobRejectedError(self.job, refusal.code, refusal.reason))
        return refusal is not None

    def fail(self, error: OutriderError) -> None:
        """Nothing more will be known of it, unless it has ended (or its future was cancelled)."""
        with suppress(InvalidStateError):
            self.ended.set_exception(error)

    def restart(self) -> None:
        """Knows nothing of the job yet, and holds what is decided from now on."""
        self.phase, self.attempt, self.why, self._node = None, 0, "", ""
        self.attempts.clear()
        self.held = self.held or []

    def _end(self, phase: Phase, at_ms: int, code: str = "", reason: str = "") -> None:
        self.phase = phase
        end = JobEnd(
            job=self.job, phase=phase, at_ms=at_ms, attempt=self.attempt, code=code,
            reason=reason, attempts=tuple(self.attempts),
        )  # fmt: skip
        with suppress(InvalidStateError):
            self.ended.set_result(end)


def _story(released: Released, node: str) -> AttemptStory:
    return AttemptStory(
        attempt=released.attempt, node=node, outcome=released.outcome, detail=released.detail,
        exit_code=released.exit_code, result=released.source,
    )  # fmt: skip


def job_of(decision: Decision) -> str:
    """The job that a decision is about; "" where it is about none."""
    if isinstance(decision, Ingested):
        return decision.job.id
    job = getattr(decision, "job", "")
    return job if isinstance(job, str) else ""
