"""Placement: a pure function of one frozen state that emits a plan which may be refused.

Order: higher priority first, then submission order; a job that fits nowhere is skipped, and with
it all jobs of its shape, so that the others go on (best-effort FIFO, as Kueue calls it).
Node: a job without GPUs goes where the largest share is free (spread, so that neighbours disturb
each other least); a job with GPUs goes where the fewest GPUs are free (pack, so that whole nodes
stay whole). Ties go to the first node by name. Which devices and cores of the node: `devices`.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from controlplane.core.bounds import NODE_CHECKS_MAX
from controlplane.core.devices import Demand, Linkages, choose
from dataplane.core.devices import NOTHING, PLAIN, Grant, Held, Room, lacking
from dataplane.core.nodes import Node, Reservation, Shape, unmet_rules
from dataplane.core.pending import Entry, ShapeQueue
from dataplane.core.state import PoolState


class Placement(NamedTuple):
    """One job's place."""

    job: str
    node: str
    incarnation: int
    grant: Grant

    @property
    def gpus(self) -> tuple[int, ...]:
        """Whole GPUs, by index."""
        return self.grant.gpus


class _Room:
    """What is free on one node, as this plan uses it up."""

    __slots__ = ("_linkages", "cpu", "gpus", "held", "memory", "node", "share")

    def __init__(self, node: Node, freed: list[Reservation], linkages: Linkages) -> None:
        self.node = node
        self._linkages = linkages
        self.cpu = node.free_cpu_millis + sum(r.cpu_millis for r in freed)
        self.memory = node.free_memory_bytes + sum(r.memory_bytes for r in freed)
        self.held: Held | None = None
        """Devices in use as this plan has it; None: as the node has it."""
        self.gpus = node.free_gpus
        if any(r.grant != NOTHING for r in freed):
            held = self._own_held()
            for r in freed:
                held.add(r.grant, r.cpu_millis, r.memory_bytes, -1)
            self._count_gpus(held)
        self.share = self._share()

    def _own_held(self) -> Held:
        if self.held is None:
            self.held = self.node.held.copy()
        return self.held

    def _count_gpus(self, held: Held) -> None:
        taken = held.gpus | held.shares.keys()
        self.gpus = tuple(sorted(set(self.node.capacity.gpus) - taken))

    def _share(self) -> float:
        """Free share of the scarcer of CPU and memory, negated: smaller is freer."""
        capacity = self.node.capacity
        return -min(
            self.cpu / max(capacity.cpu_millis, 1), self.memory / max(capacity.memory_bytes, 1)
        )

    def fits_in_numbers(self, shape: Shape) -> bool:
        """Enough of everything, wherever it is."""
        return (
            self.cpu >= shape.cpu_millis
            and self.memory >= shape.memory_bytes
            and (len(self.gpus) >= shape.gpus or bool(shape.ask.gpu_profile))
        )

    def fits(self, shape: Shape) -> bool:
        """The same, and the devices and cores that the shape asks for."""
        return self.fits_in_numbers(shape) and (shape.ask == PLAIN or self._fits_devices(shape))

    def _room(self) -> Room:
        return Room(self.node.machine, self.held or self.node.held, self.gpus)

    def _fits_devices(self, shape: Shape) -> bool:
        """A job that gets whole cores takes every thread of them: CPU time counts so, too."""
        demands = (shape.gpus, shape.cpu_millis, shape.memory_bytes)
        if lacking(self._room(), shape.ask, *demands):
            return False
        return not shape.ask.pinned or self._cpu_of(shape, self._chosen(shape)) <= self.cpu

    def _cpu_of(self, shape: Shape, grant: Grant) -> int:
        return max(shape.cpu_millis, 1000 * len(grant.cpus))

    def _chosen(self, shape: Shape) -> Grant:
        linkage = self._linkages.of(self.node.machine)
        demand = Demand(shape.ask, shape.gpus, shape.cpu_millis, shape.memory_bytes)
        grant = choose(linkage, self._room(), demand)
        assert grant is not None, "chosen without looking whether it fits"
        return grant

    def take(self, shape: Shape) -> Grant:
        """Uses up one job's worth."""
        grant = self._chosen(shape) if shape.gpus or shape.ask != PLAIN else NOTHING
        cpu = self._cpu_of(shape, grant)
        self.cpu -= cpu
        self.memory -= shape.memory_bytes
        if grant != NOTHING:
            held = self._own_held()
            held.add(grant, cpu, shape.memory_bytes)
            self._count_gpus(held)
        self.share = self._share()
        return grant


_Offer = tuple[float, str, _Room]


class _Cycle:
    """One scheduling cycle's scratch pad."""

    def __init__(self, state: PoolState, freed: dict[str, list[Reservation]],
                 closed: set[str], linkages: Linkages) -> None:  # fmt: skip
        self.rooms = [
            _Room(node, freed.get(name, []), linkages)
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
            or (shape.gpus > self.gpus_max and not shape.ask.gpu_profile)
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
                if room.fits_in_numbers(shape) and not unmet_rules(room.node, shape)
            ]
            heapify(offers)
            self.offers[shape] = offers
        packs = shape.gpus or shape.ask.shares
        return self._packed(offers, shape) if packs else self._freest(offers, shape)

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
        """The node with the fewest free GPUs that suffice. Nodes with GPUs are few: a scan.

        Devices are looked at node by node in that order, until one has them; one that has not is
        not looked at again, for room only shrinks within a cycle.
        """
        self.checks += len(offers)
        offers[:] = [offer for offer in offers if offer[2].fits_in_numbers(shape)]
        if shape.ask == PLAIN:
            return min(offers, key=_fullest)[2] if offers else None
        for offer in sorted(offers, key=_fullest):
            if offer[2].fits(shape):
                return offer[2]
            offers.remove(offer)
        return None


def _fullest(offer: _Offer) -> tuple[int, str]:
    return len(offer[2].gpus), offer[1]


class Scheduler:
    """Plans placements. Between cycles it remembers only which shapes found no room."""

    def __init__(self) -> None:
        self.cut_short = False
        """The last cycle stopped at NODE_CHECKS_MAX: there is more to look at."""
        self._linkages = Linkages()
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
        cycle = _Cycle(state, freed or {}, closed or set(), self._linkages)
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
