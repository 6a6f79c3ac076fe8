"""Sandboxes made ahead of their jobs, for the shapes that jobs have lately had.

Making one takes the larger part of a short job's time, and nothing in it depends on the command. A
prepared sandbox waits with all privileges gone, in cgroups with tight limits, for a job of exactly
its shape; the job's own limits are written before its command is sent. Each serves one job.

Making one beside a short job delays that job, so while enough wait they are made when nothing else
has happened for a while, and only when they have become few, between any two events.
"""

from __future__ import annotations

from node_agent.launcher.child import Shape
from node_agent.launcher.jobs import Job

# Shapes of this many jobs decide what is prepared; a shape that only one of them had is not worth
# the bet.
_RECENT_MAX = 16
_SEEN_MIN = 2
# Few are left: this part of the share. Then they are made at once, until none is missing.
_FEW = 4

Facts = tuple[str, ...]


class Prepared:
    """What waits for a job, and what to make next. ``size``: at most so many wait; 0 for none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: list[Shape] = []
        self._few = True
        self.waiting: list[Job] = []
        self.ending: list[Job] = []  # killed, or unfit for their job, and not reaped yet

    @property
    def alive(self) -> list[Job]:
        """All that have no job."""
        return self.waiting + self.ending

    @property
    def unfinished(self) -> bool:
        """One is being made. Joining cgroups of v1 can hold the kernel's lock on all cgroups for
        a grace period of RCU (10 ms); who makes or removes one meanwhile waits."""
        return any(not job.ready for job in self.waiting)

    def take(self, shape: Shape) -> Job | None:
        """One that fits, which then waits no more: the longest prepared, so a ready one if any."""
        if shape.probe:
            return None  # no job will be like the self-test
        self._recent = [*self._recent[-_RECENT_MAX + 1 :], shape]
        for job in self.waiting:
            if job.shape.facts == shape.facts and not job.ended_by and job.failure is None:
                self.waiting.remove(job)
                return job
        return None

    def missing(self) -> tuple[Shape, bool] | None:
        """The shape to prepare one sandbox of, if any: the latest, until it has its share. And
        whether at once: few are left, or were and the share is not full again."""
        if not self._recent:
            return None
        latest = self._recent[-1]
        seen = sum(shape.facts == latest.facts for shape in self._recent)
        if seen < _SEEN_MIN:
            return None
        share = -(-self._size * seen // len(self._recent))
        have = sum(job.shape.facts == latest.facts for job in self.waiting)
        self._few = have < share if self._few else have * _FEW <= share
        return (latest, self._few) if have < share else None

    def surplus(self) -> list[Job]:
        """The longest waiting ones beyond the size, to be killed."""
        count = max(0, len(self.waiting) - self._size)
        dropped, self.waiting = self.waiting[:count], self.waiting[count:]
        self.ending += dropped
        return dropped

    def forget(self) -> None:
        """Nothing could be made: prepare again once shapes came again."""
        self._recent = []

    def ended(self, job: Job) -> None:
        """One without a job was reaped. Nobody killed a waiting one: then nothing of its shape is
        prepared until jobs ask for it again."""
        if job in self.ending:
            self.ending.remove(job)
            return
        self.waiting.remove(job)
        self._recent = [shape for shape in self._recent if shape.facts != job.shape.facts]
