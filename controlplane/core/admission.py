"""Admission: a submission becomes a job or is refused with a code; nothing vanishes.

Codes of a refusal: those of the record's decoding (`idl.codec`), `unknown-queue`, `over-limit`,
`queue-full`, `duplicate`. All but `duplicate` go to the dead letter.
"""

import hashlib
from collections.abc import Container, Mapping

from controlplane.core.events import Submission
from dataplane.core.jobs import shorten
from dataplane.core.state import DUPLICATE_CODE, PoolState
from idl.ids import JobId, is_valid_name
from idl.jobs import NO_LIMIT_IS_ZERO, Limits, without_payload
from idl.ledger import Ingested, Rejected
from idl.settings import QueuePolicy


def job_id_of(submission: Submission) -> JobId:
    """The id of the job: the spec's, else the record key if it is a name, else its source's.

    The last is unique and always a name: a queue name too long for it is replaced by its digest.
    """
    spec, source = submission.spec, submission.source
    if spec is not None and spec.id:
        return JobId(spec.id)
    if is_valid_name(submission.key):
        return JobId(submission.key)
    derived = f"{submission.queue}-{source.partition}-{source.offset}"
    if is_valid_name(derived):
        return JobId(derived)
    digest = hashlib.blake2b(submission.queue.encode(), digest_size=8).hexdigest()
    return JobId(f"q{digest}-{source.partition}-{source.offset}")


def admit(
    submission: Submission,
    state: PoolState,
    in_batch: Container[str],
    policies: Mapping[str, QueuePolicy],
    pending: int,
) -> Ingested | Rejected:
    """The decision on one submission.

    `in_batch`: ids that the batch under construction touches. `pending`: pending jobs of the
    queue including those of the batch.
    """
    job = job_id_of(submission)
    refusal = _refusal(submission, job, state, in_batch, policies, pending)
    if refusal is not None:
        code, reason = refusal
        return Rejected(
            queue=submission.queue, source=submission.source, job=job, code=code,
            reason=shorten(reason),
        )  # fmt: skip
    assert submission.spec is not None  # _refusal looked
    return Ingested(
        queue=submission.queue,
        source=submission.source,
        job=without_payload(submission.spec, job),
        payload=submission.payload,
    )


def _refusal(
    submission: Submission,
    job: JobId,
    state: PoolState,
    in_batch: Container[str],
    policies: Mapping[str, QueuePolicy],
    pending: int,
) -> tuple[str, str] | None:
    if submission.spec is None:
        code = submission.error_code or "invalid-spec"
        return code, submission.error_message or "the record could not be decoded"
    policy = policies.get(submission.queue)
    if policy is None:
        return "unknown-queue", f"queue {submission.queue!r} is not in the cluster file"
    if state.is_known(job) or job in in_batch:
        return DUPLICATE_CODE, f"job {job} was submitted before; the first submission counts"
    too_much = _beyond(submission.spec.limits, policy.limits_max)
    if too_much:
        return "over-limit", f"{too_much} in queue {submission.queue}; ask for less"
    if policy.depth_max and pending >= policy.depth_max:
        return (
            "queue-full",
            f"queue {submission.queue} holds {pending} pending jobs of at most "
            f"{policy.depth_max}; submit again later",
        )
    return None


def _beyond(limits: Limits, most: Mapping[str, int]) -> str:
    """The first limit that exceeds what the operator allows, or "". No limit at all exceeds any."""
    for name, highest in most.items():
        wanted = getattr(limits, name)
        if name in NO_LIMIT_IS_ZERO and wanted == 0:
            return f"limits.{name} is not set; it must be, to at most {highest},"
        if wanted > highest:
            return f"limits.{name} is {wanted}, at most {highest}"
    return ""
