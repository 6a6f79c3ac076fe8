"""What the end of an attempt means for its job: finished, tried again, dead or cancelled."""

from typing import Final

from dataplane.core.jobs import PLACED, Job, shorten
from dataplane.core.state import PoolState
from idl.ids import is_valid_name
from idl.jobs import FailureKind, Retry, SourceRef
from idl.ledger import (
    Cancelled,
    DeadLettered,
    Finished,
    Released,
    ResultRefused,
    RetryScheduled,
)
from idl.records import AttemptResult, Outcome

NOT_RETRIED: Final = "NotRetried"
ATTEMPTS_EXHAUSTED: Final = "AttemptsExhausted"
START_DEADLINE_PASSED: Final = "StartDeadlinePassed"

_KIND_OF: Final[dict[Outcome, FailureKind]] = {
    "failed": "failed",
    "signalled": "signalled",
    "timed_out": "timed_out",
    "out_of_memory": "out_of_memory",
    "platform": "platform",
    "node_lost": "node_lost",
    "killed": "platform",  # on our order, yet nobody cancelled the job: not the job's fault
}

Verdict = Finished | RetryScheduled | DeadLettered | Cancelled


def backoff_ms(retry: Retry, attempt: int) -> int:
    """Delay before attempt `attempt` + 1: min(backoff · factor^(attempt−1), maximum)."""
    return int(min(retry.backoff_ms * retry.factor ** (attempt - 1), retry.backoff_max_ms))


def _verdict(job: Job, outcome: Outcome, detail: str, now_ms: int) -> Verdict:
    if outcome == "succeeded":
        return Finished(job=job.id, attempt=job.attempt)
    if job.cancel_requested:
        return Cancelled(job=job.id, by=job.cancel_by)
    retry = job.spec.retry
    kind = _KIND_OF[outcome]
    told = f"attempt {job.attempt} on {job.node} ended as {outcome}" + (
        f": {detail}" if detail else ""
    )
    if kind not in retry.on:
        why = f"{told}; the job's retry.on does not include {kind}"
        return DeadLettered(job=job.id, code=NOT_RETRIED, reason=shorten(why))
    if job.attempt >= retry.max_attempts:
        why = f"{told}; that was attempt {job.attempt} of {retry.max_attempts}"
        return DeadLettered(job=job.id, code=ATTEMPTS_EXHAUSTED, reason=shorten(why))
    return RetryScheduled(
        job=job.id,
        attempt=job.attempt + 1,
        reason=shorten(told),
        not_before_ms=now_ms + backoff_ms(retry, job.attempt),
    )


def end_attempt(
    job: Job,
    outcome: Outcome,
    now_ms: int,
    detail: str = "",
    exit_code: int | None = None,
    source: SourceRef | None = None,
) -> tuple[Released, Verdict]:
    """The two decisions that end the current attempt of a placed job."""
    detail = shorten(detail)
    released = Released(
        job=job.id, attempt=job.attempt, outcome=outcome, detail=detail, exit_code=exit_code,
        source=source,
    )  # fmt: skip
    return released, _verdict(job, outcome, detail, now_ms)


def why_refused(state: PoolState, result: AttemptResult) -> str:
    """Why a result counts for nothing; "" where it is the current attempt's (invariant 3)."""
    job = state.jobs.get(result.job)
    if job is None:
        return "the job ended already" if result.job in state.ended else "no such job"
    if job.phase not in PLACED:
        return f"no attempt is out; attempt {job.attempt} was given up"
    if result.attempt != job.attempt:
        return f"attempt {job.attempt} is current"
    if result.node != job.node:
        return f"the attempt is on node {job.node}"
    return ""


def refuse(source: SourceRef, job: str, attempt: int, reason: str) -> ResultRefused:
    """The record of a result that counts for nothing."""
    name = job if is_valid_name(job) else ""
    return ResultRefused(job=name, attempt=attempt, source=source, reason=shorten(reason))
