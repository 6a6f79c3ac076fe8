"""Placement: a pure function of one frozen state that emits a plan which may be refused.

Order: higher priority first, then submission order; a job that fits nowhere is skipped, and with
it all jobs of its shape, so that the others go on (best-effort FIFO, as Kueue calls it).
Node: a job without GPUs goes where the largest share is free (spread, so that neighbours disturb
each other least); a job with GPUs goes where the fewest GPUs are free (pack, so that whole nodes
stay whole). Ties go to the first node by name. Which devices and cores of the node: `devices`.

A cycle looks at so many nodes and no more, so it may see only the first shapes of a long queue, and
while jobs keep ending each cycle has reason to look at those again. Then it goes round: a part of
its looks goes to the head of the queue, which so keeps its precedence, the rest goes on where the
last cycle stopped. In between, a job may be overtaken; until the round is over, each was looked at.
Shapes that no node would take even if it were empty are known and cost nothing.
"""

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from controlplane.core.bounds import (
    DEVICE_CHECKS,
    HEAD_CHECKS_MAX,
    NODE_CHECKS_MAX,
    SHAPE_CHECKS,
)
from controlplane.core.devices import Demand, Linkages, choose
from controlplane.core.matching import Kind, Matching, device_checks, kind_of
from dataplane.core.devices import NOTHING, PLAIN, Grant, Held, Room, lacking
from dataplane.core.nodes import Node, Reservation, Shape
from dataplane.core.pending import Entry, PendingIndex
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


class _Rooms:
    """Some of the nodes, and the most that any of them has: room only shrinks within a cycle, so
    that stays an upper bound."""

    __slots__ = ("cpu_max", "gpus_max", "memory_max", "rooms")

    def __init__(self, rooms: list[_Room]) -> None:
        self.rooms = rooms
        self.cpu_max = max((room.cpu for room in rooms), default=0)
        self.memory_max = max((room.memory for room in rooms), default=0)
        self.gpus_max = max((len(room.gpus) for room in rooms), default=0)

    def hopeless(self, shape: Shape) -> bool:
        return (
            not self.rooms
            or shape.cpu_millis > self.cpu_max
            or shape.memory_bytes > self.memory_max
            or (shape.gpus > self.gpus_max and not shape.ask.gpu_profile)
        )


class _Cycle:
    """One scheduling cycle's scratch pad."""

    def __init__(self, state: PoolState, freed: dict[str, list[Reservation]],
                 closed: set[str], linkages: Linkages, matching: Matching) -> None:  # fmt: skip
        self._rooms = {
            name: _Room(node, freed.get(name, []), linkages)
            for name, node in state.nodes.items()
            if node.schedulable and name not in closed
        }
        self._matching = matching
        self._kinds: dict[Kind, _Rooms] = {}
        self._checks = 0
        self.all = _Rooms(list(self._rooms.values()))
        self.offers: dict[Shape, list[_Offer]] = {}
        """Of each shape that was looked at: nodes that may have room for one more job."""

    @property
    def checks(self) -> int:
        """Nodes looked at so far."""
        return self._checks + self._matching.checks

    def _kind(self, shape: Shape) -> _Rooms:
        kind = kind_of(shape)
        found = self._kinds.get(kind)
        if found is None:
            names = [node.name for node in self._matching.nodes(shape)]
            self._checks += len(names)
            rooms = [self._rooms[name] for name in names if name in self._rooms]
            found = self._kinds[kind] = _Rooms(rooms)
        return found

    def _look(self, shape: Shape) -> list[_Offer]:
        self._checks += SHAPE_CHECKS
        kind = self._kind(shape)
        if kind.hopeless(shape):
            return []
        self._checks += len(kind.rooms)
        offers = [
            (room.share, room.node.name, room)
            for room in kind.rooms
            if room.fits_in_numbers(shape)
        ]  # fmt: skip
        heapify(offers)
        return offers

    def choose(self, shape: Shape) -> _Room | None:
        """The node for one more job of this shape."""
        offers = self.offers.get(shape)
        if offers is None:
            offers = self.offers[shape] = self._look(shape)
        packs = shape.gpus or shape.ask.shares
        return self._packed(offers, shape) if packs else self._freest(offers, shape)

    def _freest(self, offers: list[_Offer], shape: Shape) -> _Room | None:
        """Top of a lazy heap: shares only get worse within a cycle, so a stale top is re-filed."""
        while offers:
            share, name, room = offers[0]
            if not self._fits(room, shape):
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
        self._checks += len(offers)
        offers[:] = [offer for offer in offers if offer[2].fits_in_numbers(shape)]
        if shape.ask == PLAIN:
            return min(offers, key=_fullest)[2] if offers else None
        for offer in sorted(offers, key=_fullest):
            if self._fits(offer[2], shape):
                return offer[2]
            offers.remove(offer)
        return None

    def _fits(self, room: _Room, shape: Shape) -> bool:
        self._checks += device_checks(shape)
        return room.fits(shape)

    def take(self, room: _Room, shape: Shape) -> Grant:
        """Uses up one job's worth of `room`."""
        self._checks += device_checks(shape) or (DEVICE_CHECKS if shape.gpus else 0)
        return room.take(shape)


def _fullest(offer: _Offer) -> tuple[int, str]:
    return len(offer[2].gpus), offer[1]


class _Round(NamedTuple):
    """A walk over more shapes than one cycle can look at."""

    behind: Entry
    """Who came before this job was looked at."""
    seq_max: int
    """The last job that it is about: newer ones are for the next round, or it would never end."""

    def covers(self, entry: Entry) -> bool:
        return entry >= self.behind and entry[1] <= self.seq_max


class _Heads:
    """The first job of every shape that may have room, in scheduling order.

    There may be thousands of shapes: nothing is made for one before its turn comes.
    """

    def __init__(self, pending: PendingIndex, excluded: set[str], heap: list[Entry]) -> None:
        """`heap`: the first job of each shape, in any order."""
        self._pending = pending
        self._excluded = excluded
        self._heap = heap
        self._others: dict[Shape, Iterator[Entry]] = {}
        """Of shapes of which the turn came: the jobs behind the first."""
        heapify(heap)

    def top(self) -> tuple[Entry, Shape] | None:
        """The first job of all; None: there is none left."""
        while self._heap:
            entry = self._heap[0]
            shape = self._pending.shape_of(entry[2])
            if shape in self._others:
                return entry, shape
            queue = self._pending.shapes[shape]
            self._others[shape] = (one for one in queue.in_order() if one[2] not in self._excluded)
            self.next_job(shape)
        return None

    def next_job(self, shape: Shape) -> None:
        """The next job of `shape`, of which the first of all is, takes its place."""
        following = next(self._others[shape], None)
        if following is None:
            heappop(self._heap)
        else:
            heapreplace(self._heap, following)

    def next_shape(self) -> None:
        """Leaves the first job, and all of its shape."""
        heappop(self._heap)

    def go_on(self, behind: _Round, known: Mapping[Shape, object]) -> bool:
        """Leaves shapes that are not known and not of what is left of the round; True if any."""
        before = len(self._heap)
        self._heap = [
            entry
            for entry in self._heap
            if behind.covers(entry) or self._pending.shape_of(entry[2]) in known
        ]
        heapify(self._heap)
        return len(self._heap) < before


def _firsts(pending: PendingIndex, shapes: set[Shape]) -> list[Entry]:
    """The first job of each of `shapes`, nearly in order."""
    if not shapes:
        return []
    return [queue.first for shape, queue in pending.shapes.items() if shape in shapes]


class Scheduler:
    """Plans placements. Between cycles it remembers which shapes found no room and which match no
    node, and how far it came with more shapes than one cycle can look at."""

    def __init__(self) -> None:
        self.cut_short = False
        """The last cycle did not look at all shapes: there is more to do."""
        self._linkages = Linkages()
        self._matching = Matching()
        self._blocked: set[Shape] = set()
        self._blocked_at = (0, 0)
        """Term and version of the room. What an earlier term's plan used up came to nothing where
        its entry was void."""
        self._round: _Round | None = None

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
        self._matching.renew(state)
        room = (state.term, state.room_version)
        if self._blocked_at != room:
            self._blocked, self._blocked_at = set(), room
        # What this entry frees or closes is not in room_version before it is applied: such a
        # cycle neither trusts nor adds to what is known to be blocked.
        blocked = self._blocked if not freed and not closed else set[Shape]()
        # Sets of thousands: this way round no shape is hashed again.
        shapes = set(state.pending.shapes) - blocked - self._matching.nowhere
        if limit <= 0 or not shapes:
            return []
        cycle = _Cycle(state, freed or {}, closed or set(), self._linkages, self._matching)
        blocked |= {shape for shape in shapes if cycle.all.hopeless(shape)}
        firsts = _firsts(state.pending, shapes - blocked)
        heads = _Heads(state.pending, excluded or set(), firsts)
        return self._place(cycle, heads, limit, blocked, state.ingested)

    def _place(
        self, cycle: _Cycle, heads: _Heads, limit: int, blocked: set[Shape], seq_max: int
    ) -> list[Placement]:
        placed: list[Placement] = []
        going_on = False
        checks_max = NODE_CHECKS_MAX if self._round is None else HEAD_CHECKS_MAX
        while len(placed) < limit:
            head = heads.top()
            if head is None:
                self._round = None
                break
            if cycle.checks > checks_max:
                if going_on or self._round is None:
                    self._stop_at(head[0], seq_max)
                    break
                going_on = True
                checks_max = cycle.checks + NODE_CHECKS_MAX - HEAD_CHECKS_MAX
                self.cut_short = heads.go_on(self._round, cycle.offers)
                continue
            entry, shape = head
            room = cycle.choose(shape)
            if room is None:
                heads.next_shape()
                blocked.add(shape)
                self._matching.note(shape)
                continue
            grant = cycle.take(room, shape)
            placed.append(Placement(entry[2], room.node.name, room.node.incarnation, grant))
            heads.next_job(shape)
        return placed

    def _stop_at(self, entry: Entry, seq_max: int) -> None:
        """The next cycle goes on here, or where this one had begun if it did not come so far."""
        self.cut_short = True
        if self._round is None:
            self._round = _Round(entry, seq_max)
        else:
            self._round = _Round(max(entry, self._round.behind), self._round.seq_max)
