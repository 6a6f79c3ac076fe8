"""How a job's end reaches its submitter when it did not succeed."""

from idl.errors import JobFaultError
from idl.records import AttemptResult, AttemptStory, Outcome


class JobEndedError(JobFaultError):
    """A job ended without a result. `code` and `reason` are the ledger's words."""

    def __init__(self, job: str, message: str, *, code: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.job = job
        self.code = code
        self.reason = reason


class JobFailedError(JobEndedError):
    """Attempts or time ran out: the job is in the dead letter (`outrider dlq show JOB`).

    `outcome`, `detail` and `exit_code` are those of the last attempt (None: there was none).
    """

    def __init__(
        self, job: str, code: str, reason: str, attempts: tuple[AttemptStory, ...] = ()
    ) -> None:
        last = attempts[-1] if attempts else None
        self.attempts = attempts
        self.outcome: Outcome | None = last.outcome if last else None
        self.detail = last.detail if last else ""
        self.exit_code = last.exit_code if last else None
        tried = f" after {len(attempts)} attempt{'s' if len(attempts) > 1 else ''}" * bool(attempts)
        super().__init__(
            job,
            f"job {job} failed{tried}: {reason or self.detail or code}; "
            f"`outrider logs {job}` shows its output",
            code=code,
            reason=reason,
        )


class JobCancelledError(JobEndedError):
    """Somebody cancelled the job."""

    def __init__(self, job: str, by: str = "") -> None:
        super().__init__(job, f"job {job} was cancelled{f' by {by}' if by else ''}",
                         code="cancelled", reason=by)  # fmt: skip


class JobRejectedError(JobEndedError):
    """The leader refused the submission; nothing of it ran."""

    def __init__(self, job: str, code: str, reason: str) -> None:
        super().__init__(
            job, f"job {job} was rejected ({code}): {reason}", code=code, reason=reason
        )


class OutputMissingError(JobFaultError):
    """The job left no such file, or it was not collected; `available` names those that were."""

    def __init__(self, name: str, result: AttemptResult | None) -> None:
        self.name = name
        self.available = tuple(output.name for output in result.outputs) if result else ()
        why = result.outputs_missing.get(name, "") if result else "no attempt wrote a result"
        there = ", ".join(self.available[:10]) or "none"
        super().__init__(f"no output {name!r}{f' ({why})' if why else ''}; collected: {there}")
