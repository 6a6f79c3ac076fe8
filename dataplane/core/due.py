"""What is due at some time, of jobs that may have moved on long before."""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

SLACK: Final = 64
"""Stale entries that are kept whatever the number of live ones."""


class Due(NamedTuple):
    """At `at_ms`, if the job is still at this attempt."""

    at_ms: int
    attempt: int
    job: str


class DueHeap:
    """Taken in order of time. Entries of jobs that moved on are stale: they are skipped by whoever
    takes them, and thrown away once they are most of all, because a standby takes none, and a
    leader none before its time, which may be a month away."""

    def __init__(self, live: Callable[[Due], bool]) -> None:
        """`live`: whether an entry is not stale."""
        self._live = live
        self._heap: list[Due] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first_ms(self) -> int:
        """When the first entry is due; 0 where there is none."""
        return self._heap[0].at_ms if self._heap else 0

    def push(self, due: Due, live_max: int) -> None:
        """`live_max`: at most so many entries can be live, apart from repeated ones."""
        heappush(self._heap, due)
        if len(self._heap) > 2 * live_max + SLACK:
            self._heap = [one for one in set(self._heap) if self._live(one)]
            heapify(self._heap)

    def take(self, now_ms: int) -> Iterator[Due]:
        """Those due by now that are not stale, out of the heap."""
        while self._heap and self._heap[0].at_ms <= now_ms:
            due = heappop(self._heap)
            if self._live(due):
                yield due
