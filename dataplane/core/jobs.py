"""A job's life: its phases, the table of transitions, and what is remembered of it.

The table is the truth; `docs/job-states.md` is generated from it. A transition that is not in the
table is our bug and raises InvariantBrokenError with the job's story.
"""

from enum import StrEnum
from typing import Final

import msgspec

from dataplane.core.nodes import Shape, shape_of
from idl.errors import InvariantBrokenError
from idl.jobs import JobSpec, PayloadLocation, SourceRef
from idl.records import AttemptStory, Outcome

STORY_LINES_KEPT: Final = 32
"""Transitions remembered per live job: several attempts' worth, for errors and `explain`."""
REASON_CHARS_MAX: Final = 512
"""Free text (details, reasons) kept per job, so that 100,000 ended jobs stay within memory."""


class Phase(StrEnum):
    """Where a job is. ENDING never outlasts one ledger entry: the verdict stands beside it."""

    PENDING = "pending"
    ASSIGNED = "assigned"
    RUNNING = "running"
    ENDING = "ending"
    BACKING_OFF = "backing_off"
    FINISHED = "finished"
    DEAD = "dead"
    CANCELLED = "cancelled"


class Cause(StrEnum):
    """What moves a job: the ledger decisions about it."""

    ASSIGNED = "Assigned"
    STARTED = "Started"
    RELEASED = "Released"
    RETRY_SCHEDULED = "RetryScheduled"
    FINISHED = "Finished"
    DEAD_LETTERED = "DeadLettered"
    CANCELLED = "Cancelled"


TRANSITIONS: Final[dict[tuple[Phase, Cause], Phase]] = {
    (Phase.PENDING, Cause.ASSIGNED): Phase.ASSIGNED,
    (Phase.PENDING, Cause.CANCELLED): Phase.CANCELLED,
    (Phase.PENDING, Cause.DEAD_LETTERED): Phase.DEAD,
    (Phase.ASSIGNED, Cause.STARTED): Phase.RUNNING,
    (Phase.ASSIGNED, Cause.RELEASED): Phase.ENDING,
    (Phase.RUNNING, Cause.RELEASED): Phase.ENDING,
    (Phase.ENDING, Cause.FINISHED): Phase.FINISHED,
    (Phase.ENDING, Cause.RETRY_SCHEDULED): Phase.BACKING_OFF,
    (Phase.ENDING, Cause.DEAD_LETTERED): Phase.DEAD,
    (Phase.ENDING, Cause.CANCELLED): Phase.CANCELLED,
    (Phase.BACKING_OFF, Cause.ASSIGNED): Phase.ASSIGNED,
    (Phase.BACKING_OFF, Cause.CANCELLED): Phase.CANCELLED,
    (Phase.BACKING_OFF, Cause.DEAD_LETTERED): Phase.DEAD,
}

WAITING: Final = frozenset({Phase.PENDING, Phase.BACKING_OFF})
"""Holds no resources; counted as pending."""
PLACED: Final = frozenset({Phase.ASSIGNED, Phase.RUNNING})
"""Has a current attempt that holds resources on a node."""
ENDED: Final = frozenset({Phase.FINISHED, Phase.DEAD, Phase.CANCELLED})
"""Final: nothing moves such a job any more (invariant 2)."""


def shorten(text: str) -> str:
    """`text` cut to REASON_CHARS_MAX, the cut marked."""
    return text if len(text) <= REASON_CHARS_MAX else text[: REASON_CHARS_MAX - 1] + "…"


class Job:
    """A live job. Mutated by `PoolState.apply` alone."""

    __slots__ = (
        "attempt", "attempts", "cancel_by", "cancel_requested", "gpus", "id", "incarnation",
        "ingested_ms", "lease_awaited", "lease_ms", "node", "not_before_ms", "payload", "phase",
        "queue", "seq", "shape", "source", "spec", "started_ms", "started_once", "story", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        spec: JobSpec,
        queue: str,
        source: SourceRef,
        payload: PayloadLocation | None,
        seq: int,
        at_ms: int,
    ) -> None:
        self.id = spec.id
        self.spec = spec
        self.queue = queue
        self.source = source
        self.payload = payload
        self.seq = seq
        """Place in the order of ingestion, pool-wide; kept across retries."""
        self.ingested_ms = at_ms
        self.shape: Shape = shape_of(spec)
        self.phase = Phase.PENDING
        self.attempt = 0
        """Number of the current or last attempt; 0 before the first."""
        self.node = ""
        self.incarnation = 0
        self.gpus: tuple[int, ...] = ()
        self.lease_ms = 0
        """Length of the leases of the current attempt of an exclusive job; else 0."""
        self.lease_awaited: tuple[int, int] | None = None
        """(term, until ms): the current attempt is given up, and its lease over by then."""
        self.started_ms = 0
        self.started_once = False
        self.not_before_ms = 0
        self.waiting: tuple[str, str] | None = None
        """Last recorded (code, message) why it cannot be placed."""
        self.cancel_requested = False
        self.cancel_by = ""
        self.attempts: tuple[AttemptStory, ...] = ()
        self.story: list[tuple[int, str]] = [(at_ms, "Ingested")]

    @property
    def rank(self) -> tuple[int, int]:
        """Scheduling order: higher priority first, then submission order."""
        return (-self.spec.priority, self.seq)

    @property
    def start_deadline_ms(self) -> int:
        """Epoch ms after which the job is dead unless an attempt has started; 0: none."""
        if not self.spec.start_within_ms or self.started_once:
            return 0
        return self.ingested_ms + self.spec.start_within_ms

    def move(self, cause: Cause, at_ms: int, note: str = "") -> None:
        """Carries out the transition. Raises InvariantBrokenError where the table has none."""
        target = TRANSITIONS.get((self.phase, cause))
        if target is None:
            raise self.broken(f"{cause} is illegal for a job that is {self.phase}")
        self.phase = target
        self.story.append((at_ms, f"{cause} {note}" if note else cause))
        if len(self.story) > STORY_LINES_KEPT:
            del self.story[1]

    def told(self) -> tuple[str, ...]:
        """The remembered transitions, oldest first, one line each."""
        return tuple(f"{at_ms} {line}" for at_ms, line in self.story)

    def broken(self, message: str) -> InvariantBrokenError:
        """An error about this job that carries its story."""
        return InvariantBrokenError(f"job {self.id} (attempt {self.attempt}): {message}",
                                    self.told())  # fmt: skip


class EndedJob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is kept of a job that ended: enough for `outrider ls` and to refuse duplicates."""

    id: str
    queue: str
    phase: Phase
    name: str = ""
    group: str = ""
    attempt: int = 0
    node: str = ""
    code: str = ""
    reason: str = ""
    outcome: Outcome | None = None
    exit_code: int | None = None
    result: SourceRef | None = None
    ingested_ms: int = 0
    started_ms: int = 0
    ended_ms: int = 0


def ended_job(job: Job, at_ms: int, code: str = "", reason: str = "") -> EndedJob:
    """The compact record of `job`, whose phase is final."""
    last = job.attempts[-1] if job.attempts else None
    return EndedJob(
        id=job.id, queue=job.queue, phase=job.phase, name=job.spec.name, group=job.spec.group,
        attempt=job.attempt, node=last.node if last else "", code=code, reason=shorten(reason),
        outcome=last.outcome if last else None, exit_code=last.exit_code if last else None,
        result=last.result if last else None, ingested_ms=job.ingested_ms,
        started_ms=job.started_ms, ended_ms=at_ms,
    )  # fmt: skip


def describe_transitions() -> str:
    """`docs/job-states.md`: the table as a diagram and as rows."""
    rows = [(str(a), str(cause), str(b)) for (a, cause), b in TRANSITIONS.items()]
    lines = [
        "# Job states",
        "",
        "Generated from `dataplane/core/jobs.py` (TRANSITIONS); a test keeps this page in step.",
        "Every arrow is a ledger decision. `ending` never outlasts one ledger entry: the verdict",
        "stands in the same entry as the `Released` that frees the attempt's resources.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> pending: Ingested",
        *(f"    {a} --> {b}: {cause}" for a, cause, b in rows),
        *(f"    {phase} --> [*]" for phase in Phase if phase in ENDED),
        "```",
        "",
        "| from | decision | to |",
        "|---|---|---|",
        "| – | Ingested | pending |",
        *(f"| {a} | {cause} | {b} |" for a, cause, b in rows),
        "",
    ]
    return "\n".join(lines)
