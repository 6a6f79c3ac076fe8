"""Pending jobs, indexed for the scheduler: by shape, and within a shape by scheduling order.

Derived from the jobs, never part of the truth. The scheduler walks it without changing it.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Final

from dataplane.core.nodes import Shape

STALE_ENTRIES_MIN: Final = 64
"""Removed entries that are not first stay in a heap until they are this many and half of it
(amortised O(1))."""

Entry = tuple[int, int, str]
"""(−priority, ingest sequence, job id)."""


class ShapeQueue:
    """The pending jobs of one shape."""

    __slots__ = ("heap", "joined", "members")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self.members: dict[str, Entry] = {}
        self.joined = 0
        """How many ever joined: tells a reader that there is somebody new, see `latest`."""

    def add(self, entry: Entry) -> None:
        self.members.pop(entry[2], None)  # whoever joins again is among the latest
        self.members[entry[2]] = entry
        self.joined += 1
        heappush(self.heap, entry)

    def remove(self, job: str) -> None:
        """What is removed is mostly what comes first: nobody walks over that again."""
        self.members.pop(job, None)
        while self.heap and self.members.get(self.heap[0][2]) != self.heap[0]:
            heappop(self.heap)
        stale = len(self.heap) - len(self.members)
        if stale > STALE_ENTRIES_MIN and stale * 2 > len(self.heap):
            self.heap = list(self.members.values())
            heapify(self.heap)

    @property
    def first(self) -> Entry:
        """The first member; a queue in the index has one."""
        return self.heap[0]

    def latest(self, since: int) -> list[str]:
        """Jobs that joined after `joined` was `since`, in that order, and maybe some from before:
        as many as left. O(joined since)."""
        newest = islice(reversed(self.members), self.joined - since)
        return list(newest)[::-1]

    def in_order(self) -> Iterator[Entry]:
        """Members in scheduling order, O(log k) for the k-th, the heap left as it is."""
        heap, members = self.heap, self.members
        frontier = [(heap[0], 0)] if heap else []
        last: Entry | None = None
        while frontier:
            entry, index = heappop(frontier)
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))
            if members.get(entry[2]) == entry and entry != last:
                last = entry
                yield entry


class PendingIndex:
    """All pending jobs that may be placed now."""

    __slots__ = ("_shape_of", "shapes")

    def __init__(self) -> None:
        self.shapes: dict[Shape, ShapeQueue] = {}
        self._shape_of: dict[str, Shape] = {}

    def __len__(self) -> int:
        return len(self._shape_of)

    def __contains__(self, job: str) -> bool:
        return job in self._shape_of

    def shape_of(self, job: str) -> Shape:
        """Of a job that is in."""
        return self._shape_of[job]

    def add(self, shape: Shape, rank: tuple[int, int], job: str) -> None:
        """Puts a job in its place."""
        queue = self.shapes.get(shape)
        if queue is None:
            queue = self.shapes[shape] = ShapeQueue()
        self._shape_of[job] = shape
        queue.add((*rank, job))

    def remove(self, job: str) -> None:
        """Takes a job out, if it is in."""
        shape = self._shape_of.pop(job, None)
        if shape is None:
            return
        queue = self.shapes[shape]
        queue.remove(job)
        if not queue.members:
            del self.shapes[shape]

    def ahead_of(self, rank: tuple[int, int]) -> int:
        """How many pending jobs come before `rank`. Walks all of them: for people, not cycles."""
        return sum(
            entry[:2] < rank for queue in self.shapes.values() for entry in queue.members.values()
        )
