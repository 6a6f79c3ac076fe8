"""Nodes as the ledger knows them: what they offer, what is reserved, and whom they suit.

A *shape* is everything of a job that placement looks at. Jobs of one shape are interchangeable for
placement, so that thousands of identical jobs that fit nowhere are looked at once per cycle.
"""

from functools import lru_cache
from typing import Final, NamedTuple

from dataplane.core.devices import (
    NOTHING,
    NOTHING_HELD,
    PLAIN,
    Ask,
    Grant,
    Held,
    Machine,
    Room,
    ask_of,
    lacking,
    whole_cores_millis,
)
from idl.errors import InvariantBrokenError
from idl.jobs import JobSpec, LimitName, required_labels, required_limits
from idl.ledger import Capacity, NodeSeen
from idl.topology import GpuShare, Topology

SHAPES_SHARED: Final = 4_096
"""Shapes of which equal ones are one object. Memory, and the garbage collector's time: it looks at
every tuple that jobs hold, and meanwhile a leader hears nobody."""


class Shape(NamedTuple):
    """What placement asks of a node."""

    cpu_millis: int
    memory_bytes: int
    gpus: int
    require: tuple[LimitName, ...]
    labels: tuple[tuple[str, str], ...]
    ask: Ask = PLAIN
    image: str = ""


def shape_of(spec: JobSpec) -> Shape:
    """The shape of a job, equal for jobs that ask the same in any order of words."""
    found = Shape(
        spec.resources.cpu_millis,
        spec.resources.memory_bytes,
        spec.resources.gpus,
        tuple(sorted(set(required_limits(spec)))),
        tuple(sorted(required_labels(spec).items())),
        ask_of(spec.resources),
        spec.image,
    )
    return _one_for_all(found)


@lru_cache(maxsize=SHAPES_SHARED)
def _one_for_all(shape: Shape) -> Shape:
    return shape


class Reservation(NamedTuple):
    """What one attempt holds on a node. `incarnation`: the node's when it was assigned.

    `cpu_millis` is at least a thousand for each of `cpus`: a core given whole is taken whole.
    """

    attempt: int
    incarnation: int
    cpu_millis: int
    memory_bytes: int
    gpus: tuple[int, ...] = ()
    mig: tuple[str, ...] = ()
    share: GpuShare | None = None
    cpus: tuple[int, ...] = ()
    mems: tuple[int, ...] = ()

    @property
    def grant(self) -> Grant:
        """The part of it that is devices, cores and domains."""
        return Grant(self.gpus, self.mig, self.share, self.cpus, self.mems)


class Node:
    """One node of the pool. Mutated by `PoolState.apply` alone."""

    __slots__ = (
        "attempts", "capacity", "drain_ordered", "drain_reason", "drain_reported", "enforces",
        "free_cpu_millis", "free_gpus", "free_memory_bytes", "given_up", "held", "images",
        "incarnation", "labels", "lost", "lost_reason", "machine", "name", "seen_ms", "simulated",
        "topology",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.incarnation = 0
        self.capacity = Capacity(cpu_millis=0, memory_bytes=0)
        self.enforces: frozenset[str] = frozenset()
        self.labels: dict[str, str] = {}
        self.images: dict[str, str] = {}
        self.drain_reported = False
        self.drain_reason = ""
        """The node's own words, while it says that it drains."""
        self.drain_ordered = False
        self.lost = False
        self.lost_reason = ""
        self.seen_ms = 0
        self.free_cpu_millis = 0
        self.free_memory_bytes = 0
        self.free_gpus: tuple[int, ...] = ()
        """Whole GPUs nobody holds, ascending."""
        self.topology = Topology()
        self.simulated = False
        self.machine = Machine(self.topology, ())
        self.held = Held()
        """What attempts hold of `machine`."""
        self.attempts: dict[str, Reservation] = {}
        """Current attempts by job id, until their end is confirmed."""
        self.given_up: dict[tuple[str, int], Reservation] = {}
        """Attempts released without a result that the node may still hold, by (job, attempt)."""

    @property
    def draining(self) -> bool:
        """Nothing more is placed here: the node said so, or an operator did."""
        return self.drain_reported or self.drain_ordered

    @property
    def schedulable(self) -> bool:
        """True where new attempts may be placed."""
        return not self.lost and not self.draining

    def see(self, seen: NodeSeen, at_ms: int) -> None:
        """Takes over what the node offers now; what is reserved stays reserved.

        A new incarnation holds nothing of what its predecessor was given (ADR 0006).
        """
        if seen.incarnation != self.incarnation:
            self.given_up.clear()
        self.incarnation = seen.incarnation
        self.capacity = seen.capacity
        self.enforces = frozenset(seen.enforces)
        self.labels, self.images = dict(seen.labels), dict(seen.images)
        self.drain_reported, self.drain_reason = seen.draining, seen.drain_reason
        self.topology, self.simulated = seen.topology, seen.simulated
        self.machine = Machine(seen.topology, seen.capacity.gpus)
        self.lost, self.lost_reason = False, ""
        self.seen_ms = at_ms
        self.recount()

    def recount(self) -> None:
        """Free room from capacity and what is held."""
        held = self._reservations()
        self.free_cpu_millis = self.capacity.cpu_millis - sum(r.cpu_millis for r in held)
        self.free_memory_bytes = self.capacity.memory_bytes - sum(r.memory_bytes for r in held)
        self.held = Held()
        for reservation in held:
            self.held.add(reservation.grant, reservation.cpu_millis, reservation.memory_bytes)
        self._count_free_gpus()

    def _count_free_gpus(self) -> None:
        taken = self.held.gpus | self.held.shares.keys()
        self.free_gpus = tuple(sorted(set(self.capacity.gpus) - taken))

    @property
    def room(self) -> Room:
        """What is free of its devices, cores and domains."""
        return Room(self.machine, self.held, self.free_gpus)

    @property
    def whole_room(self) -> Room:
        """The same of the node without any attempt."""
        return Room(self.machine, NOTHING_HELD, self.capacity.gpus)

    def _reservations(self) -> list[Reservation]:
        return [*self.attempts.values(), *self.given_up.values()]

    def reserve(self, job: str, reservation: Reservation) -> None:
        """Takes room. Raises InvariantBrokenError where there is none (invariant 5)."""
        fits = (
            not self.lost
            and reservation.incarnation == self.incarnation
            and reservation.cpu_millis <= self.free_cpu_millis
            and reservation.memory_bytes <= self.free_memory_bytes
            and set(reservation.gpus) <= set(self.free_gpus)
            and job not in self.attempts
        )
        if not fits:
            raise InvariantBrokenError(f"node {self.name} has no room for {reservation} of {job}")
        grant = reservation.grant
        if not grant.plain:
            demands = (reservation.cpu_millis, reservation.memory_bytes)
            problem = self.held.problem(self.machine, grant, *demands)
            if problem:
                raise InvariantBrokenError(f"node {self.name}, {reservation} of {job}: {problem}")
        self.attempts[job] = reservation
        if grant != NOTHING:
            self.held.add(grant, reservation.cpu_millis, reservation.memory_bytes)
        self.free_cpu_millis -= reservation.cpu_millis
        self.free_memory_bytes -= reservation.memory_bytes
        if reservation.gpus or reservation.share:
            self._count_free_gpus()

    def give_up(self, job: str) -> None:
        """`job`'s attempt is released without a result. Its room returns only where the node
        cannot hold it any more: it is of another incarnation now."""
        reservation = self.attempts[job]
        if reservation.incarnation != self.incarnation:
            self.release(job)
            return
        del self.attempts[job]
        self.given_up[job, reservation.attempt] = reservation

    def vacate(self, job: str, attempt: int) -> None:
        """Gives back the room of an attempt that was given up; nothing where there is none."""
        if self.given_up.pop((job, attempt), None) is not None:
            self.recount()

    def release(self, job: str) -> None:
        """Gives the room of `job`'s attempt back."""
        reservation = self.attempts.pop(job)
        self.free_cpu_millis += reservation.cpu_millis
        self.free_memory_bytes += reservation.memory_bytes
        if reservation.grant != NOTHING:
            self.recount()

    def check_invariants(self) -> None:
        """Free = capacity − reserved, and nothing is held twice. Raises InvariantBrokenError."""
        free = (self.free_cpu_millis, self.free_memory_bytes, self.free_gpus, self.held.content())
        self.recount()
        again = (self.free_cpu_millis, self.free_memory_bytes, self.free_gpus, self.held.content())
        if free != again:
            raise InvariantBrokenError(f"node {self.name}: free room was miscounted as {free}")
        held = [index for reservation in self._reservations() for index in reservation.gpus]
        if len(held) != len(set(held)):
            raise InvariantBrokenError(f"node {self.name}: a GPU is held twice: {sorted(held)}")
        parts = [uuid for reservation in self._reservations() for uuid in reservation.mig]
        cpus = [cpu for reservation in self._reservations() for cpu in reservation.cpus]
        if len(parts) != len(set(parts)) or len(cpus) != len(set(cpus)):
            raise InvariantBrokenError(f"node {self.name}: a MIG instance or CPU is held twice")
        self._check_sums()

    def _check_sums(self) -> None:
        """No GPU is shared out beyond itself, no domain beyond its memory."""
        for index, (millis, size) in self.held.shares.items():
            gpu = self.machine.whole.get(index)  # None: it fell ill meanwhile
            if index in self.held.gpus or millis > 1000 or (gpu and size > gpu.memory_bytes):
                raise InvariantBrokenError(f"node {self.name}: GPU {index} is over-committed")
        for number, size in self.held.bound_bytes.items():
            domain = self.machine.domains.get(number)
            if domain is not None and size > domain.memory_bytes:
                raise InvariantBrokenError(f"node {self.name}: NUMA {number} is over-committed")


def unmet_by_capacity(node: Node, shape: Shape) -> tuple[str, ...]:
    """Which demands of `shape` the node could not meet even if it were empty; () for none.

    Words are stable: `cpu`, `memory`, those of `unmet_rules`, and those of `devices.lacking`
    (`gpus`, `gpu_model`, `numa`, …).
    """
    unmet: list[str] = []
    if node.capacity.cpu_millis < shape.cpu_millis:
        unmet.append("cpu")
    if node.capacity.memory_bytes < shape.memory_bytes:
        unmet.append("memory")
    if shape.ask != PLAIN:
        unmet.extend(_lacking(node.whole_room, node.capacity.cpu_millis, shape))
    elif len(node.capacity.gpus) < shape.gpus:
        unmet.append("gpus")
    return (*unmet, *unmet_rules(node, shape))


def _lacking(room: Room, cpu_millis: int, shape: Shape) -> tuple[str, ...]:
    """As `devices.lacking`, in a room with so much CPU time: whole cores may need more of it than
    was asked."""
    words = lacking(room, shape.ask, shape.gpus, shape.cpu_millis, shape.memory_bytes)
    if not words and shape.ask.pinned and shape.cpu_millis <= cpu_millis:
        short = whole_cores_millis(room, shape.cpu_millis) > cpu_millis
        words = ("cores",) if short else ()
    return words


def unmet_rules(node: Node, shape: Shape) -> tuple[str, ...]:
    """Which demands are met or not whatever is free: `enforcement:<limit>`, `label:<key>`, and
    `image:<name>`."""
    if meets_rules(node, shape):
        return ()
    return (
        *((f"image:{shape.image}",) if shape.image and shape.image not in node.images else ()),
        *(f"enforcement:{limit}" for limit in shape.require if limit not in node.enforces),
        *(f"label:{key}" for key, value in shape.labels if node.labels.get(key) != value),
    )


def meets_rules(node: Node, shape: Shape) -> bool:
    """True where `unmet_rules` has nothing to say, in a fraction of its time."""
    if shape.image and shape.image not in node.images:
        return False
    for key, value in shape.labels:
        if node.labels.get(key) != value:
            return False
    return node.enforces.issuperset(shape.require)


def unmet_by_free_room(node: Node, shape: Shape) -> tuple[str, ...]:
    """What of the node is taken by others right now, in the same words; () where it fits."""
    unmet: list[str] = []
    if node.free_cpu_millis < shape.cpu_millis:
        unmet.append("cpu")
    if node.free_memory_bytes < shape.memory_bytes:
        unmet.append("memory")
    if shape.ask != PLAIN:
        unmet.extend(_lacking(node.room, node.free_cpu_millis, shape))
    elif len(node.free_gpus) < shape.gpus:
        unmet.append("gpus")
    return tuple(unmet)
