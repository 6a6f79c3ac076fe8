"""Placement: a pure function of one frozen state that emits a plan which may be refused.

Order: higher priority first, then submission order; a job that fits nowhere is skipped, and with
it all jobs of its shape, so that the others go on (best-effort FIFO, as Kueue calls it).
Node: a job without GPUs goes where the largest share is free (spread, so that neighbours disturb
each other least); a job with GPUs goes where the fewest GPUs are free (pack, so that whole nodes
stay whole). Ties go to the first node by name, GPU indices are taken lowest first.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from controlplane.core.bounds import NODE_CHECKS_MAX
from dataplane.core.nodes import Node, Reservation, Shape, unmet_by_capacity
from dataplane.core.pending import Entry, ShapeQueue
from dataplane.core.state import PoolState


class Placement(NamedTuple):
    """One job's place."""

    job: str
    node: str
    incarnation: int
    gpus: tuple[int, ...]


class _Room:
    """What is free on one node, as this plan uses it up."""

    __slots__ = ("cpu", "gpus", "memory", "node", "share")

    def __init__(self, node: Node, freed: list[Reservation]) -> None:
        self.node = node
        self.cpu = node.free_cpu_millis + sum(r.cpu_millis for r in freed)
        self.memory = node.free_memory_bytes + sum(r.memory_bytes for r in freed)
        given = {index for r in freed for index in r.gpus} & set(node.capacity.gpus)
        self.gpus = tuple(sorted(given | set(node.free_gpus)))
        self.share = self._share()

    def _share(self) -> float:
        """Free share of the scarcer of CPU and memory, negated: smaller is freer."""
        capacity = self.node.capacity
        return -min(
            self.cpu / max(capacity.cpu_millis, 1), self.memory / max(capacity.memory_bytes, 1)
        )

    def fits(self, shape: Shape) -> bool:
        return (
            self.cpu >= shape.cpu_millis
            and self.memory >= shape.memory_bytes
            and len(self.gpus) >= shape.gpus
        )

    def take(self, shape: Shape) -> tuple[int, ...]:
        """Uses up one job's worth; returns its GPU indices."""
        self.cpu -= shape.cpu_millis
        self.memory -= shape.memory_bytes
        taken, self.gpus = self.gpus[: shape.gpus], self.gpus[shape.gpus :]
        self.share = self._share()
        return taken


_Offer = tuple[float, str, _Room]


class _Cycle:
    """One scheduling cycle's scratch pad."""

    def __init__(self, state: PoolState, freed: dict[str, list[Reservation]],
                 closed: set[str]) -> None:  # fmt: skip
        self.rooms = [
            _Room(node, freed.get(name, []))
            for name, node in state.nodes.items()
            if node.schedulable and name not in closed
        ]
        self.offers: dict[Shape, list[_Offer]] = {}
        self.checks = 0
        # No node has more than this; room only shrinks within a cycle, so it stays an upper bound.
        self.cpu_max = max((room.cpu for room in self.rooms), default=0)
        self.memory_max = max((room.memory for room in self.rooms), default=0)
        self.gpus_max = max((len(room.gpus) for room in self.rooms), default=0)

    def hopeless(self, shape: Shape) -> bool:
        return (
            shape.cpu_millis > self.cpu_max
            or shape.memory_bytes > self.memory_max
            or shape.gpus > self.gpus_max
        )

    def choose(self, shape: Shape) -> _Room | None:
        if self.hopeless(shape):
            return None
        offers = self.offers.get(shape)
        if offers is None:
            self.checks += len(self.rooms)
            offers = [
                (room.share, room.node.name, room)
                for room in self.rooms
                if room.fits(shape) and not unmet_by_capacity(room.node, shape)
            ]
            heapify(offers)
            self.offers[shape] = offers
        return self._packed(offers, shape) if shape.gpus else self._freest(offers, shape)

    @staticmethod
    def _freest(offers: list[_Offer], shape: Shape) -> _Room | None:
        """Top of a lazy heap: shares only get worse within a cycle, so a stale top is re-filed."""
        while offers:
            share, name, room = offers[0]
            if not room.fits(shape):
                heappop(offers)
            elif share != room.share:
                heapreplace(offers, (room.share, name, room))
            else:
                return room
        return None

    def _packed(self, offers: list[_Offer], shape: Shape) -> _Room | None:
        """The node with the fewest free GPUs that suffice. Nodes with GPUs are few: a scan."""
        self.checks += len(offers)
        fitting = [(len(room.gpus), name, room) for _, name, room in offers if room.fits(shape)]
        return min(fitting, key=lambda offer: offer[:2])[2] if fitting else None


class Scheduler:
    """Plans placements. Between cycles it remembers only which shapes found no room."""

    def __init__(self) -> None:
        self.cut_short = False
        """The last cycle stopped at NODE_CHECKS_MAX: there is more to look at."""
        self._blocked: set[Shape] = set()
        self._blocked_at = -1

    def plan(
        self,
        state: PoolState,
        limit: int,
        excluded: set[str] | None = None,
        freed: dict[str, list[Reservation]] | None = None,
        closed: set[str] | None = None,
    ) -> list[Placement]:
        """At most `limit` placements, in the order in which they were decided.

        `excluded`: jobs that must not be placed now. `freed`: by node, reservations that the same
        ledger entry releases before. `closed`: nodes that take nothing in this cycle.
        """
        self.cut_short = False
        if self._blocked_at != state.room_version:
            self._blocked, self._blocked_at = set(), state.room_version
        # What this entry frees or closes is not in room_version before it is applied: such a
        # cycle neither trusts nor adds to what is known to be blocked.
        blocked = self._blocked if not freed and not closed else set[Shape]()
        if limit <= 0 or state.pending.shapes.keys() <= blocked:
            return []
        cycle = _Cycle(state, freed or {}, closed or set())
        heads = self._heads(state, blocked, excluded or set(), cycle)
        placed: list[Placement] = []
        while heads and len(placed) < limit:
            if cycle.checks > NODE_CHECKS_MAX:
                self.cut_short = True
                break
            entry, number, shape, others = heads[0]
            room = cycle.choose(shape)
            if room is None:
                heappop(heads)
                blocked.add(shape)
                continue
            node = room.node
            placed.append(Placement(entry[2], node.name, node.incarnation, room.take(shape)))
            following = next(others, None)
            if following is None:
                heappop(heads)
            else:
                heapreplace(heads, (following, number, shape, others))
        return placed

    def _heads(
        self, state: PoolState, blocked: set[Shape], excluded: set[str], cycle: _Cycle
    ) -> list[tuple[Entry, int, Shape, Iterator[Entry]]]:
        """The first job of every shape that may have room, as a heap in scheduling order."""
        heads: list[tuple[Entry, int, Shape, Iterator[Entry]]] = []
        for number, (shape, queue) in enumerate(state.pending.shapes.items()):
            if shape in blocked:
                continue
            if cycle.hopeless(shape):
                blocked.add(shape)
                continue
            others = _candidates(queue, excluded)
            first = next(others, None)
            if first is not None:
                heappush(heads, (first, number, shape, others))
        return heads


def _candidates(queue: ShapeQueue, excluded: set[str]) -> Iterator[Entry]:
    return (entry for entry in queue.in_order() if entry[2] not in excluded)
