"""Which GPUs, cores and NUMA domain a job gets on a node: the best, doing the least damage.

GPUs, in this order: most NVLinks between them, fewest NUMA domains, the strongest weakest link,
the shortest PCIe ways; among equals those that leave the most useful rest; among those the lowest
indices. Useful is what the next jobs can still get: the best set of eight, of four, of two.
Exact up to EXACT_GPUS_MAX GPUs a node, a bounded search beyond. Pure; `docs/topology.md` tells
it with the hybrid cube mesh as the example.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final, NamedTuple

from dataplane.core.devices import (
    Ask,
    Domain,
    Grant,
    Held,
    Machine,
    Room,
    components,
    fits_domain,
    lacking,
    mig_matches,
    share_candidates,
    within,
)

EXACT_GPUS_MAX: Final = 8
"""All subsets of eight GPUs are 256, looked up in microseconds; of sixteen, 65,536."""
SCORES_KEPT: Final = 20_000
"""Sets of GPUs whose score is remembered per kind of machine: about 5 MB."""
LINKAGES_KEPT: Final = 64
"""Kinds of machines remembered: a pool has few, but nodes that lost a GPU are of their own kind."""
_SIZES: Final = (8, 4, 2)
"""Sets that the rest is judged by: the usual sizes of jobs with several GPUs."""

Score = tuple[int, int, int, int]
"""(links inside, −domains, links of the weakest pair, −sum of PCIe levels): greater is better."""
_IMPOSSIBLE: Final[Score] = (-1, 0, 0, 0)


class Linkage:
    """The GPUs of one machine as a graph, with what was worked out about it before.

    Of `machine` only links, levels and domains are looked at: nodes with equal ones share it.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._scores: dict[frozenset[int], Score] = {}
        self._best: dict[tuple[int, frozenset[int]], Score] = {}

    def score(self, gpus: frozenset[int]) -> Score:
        """How good this set is for one job."""
        known = self._scores.get(gpus)
        if known is None:
            if len(self._scores) >= SCORES_KEPT:
                self._scores.clear()
            pairs = list(combinations(sorted(gpus), 2))
            links = [self.machine.links(*pair) for pair in pairs]
            domains = {self.machine.numa_of(index) for index in gpus}
            pcie = sum(self.machine.pcie(*pair) for pair in pairs)
            known = (sum(links), -len(domains), min(links, default=0), -pcie)
            self._scores[gpus] = known
        return known

    def best(self, size: int, gpus: frozenset[int]) -> Score:
        """The best score of `size` of these GPUs. Asked for at most EXACT_GPUS_MAX of them."""
        if len(gpus) <= size:
            return self.score(gpus) if len(gpus) == size else _IMPOSSIBLE
        known = self._best.get((size, gpus))
        if known is None:
            known = max(self.best(size, gpus - {index}) for index in gpus)
            self._best[size, gpus] = known
        return known

    def usefulness(self, rest: frozenset[int]) -> tuple[object, ...]:
        """What is left for others; greater is better."""
        if len(rest) <= EXACT_GPUS_MAX:
            return (*(self.best(size, rest) for size in _SIZES), self.score(rest))
        counts: dict[int, int] = {}
        for index in rest:
            domain = self.machine.numa_of(index)
            counts[domain] = counts.get(domain, 0) + 1
        return (sorted(counts.values(), reverse=True), self.score(rest))


class Linkages:
    """One Linkage for all machines whose GPUs are connected alike."""

    def __init__(self) -> None:
        self._known: dict[object, Linkage] = {}

    def of(self, machine: Machine) -> Linkage:
        """That of this machine."""
        found = self._known.get(machine.graph)
        if found is None:
            if len(self._known) >= LINKAGES_KEPT:
                del self._known[next(iter(self._known))]
            found = self._known[machine.graph] = Linkage(machine)
        return found


def choose_gpus(
    linkage: Linkage, free: Sequence[int], eligible: Iterable[int], count: int, links: str
) -> tuple[int, ...]:
    """`count` of the `eligible` ones, ascending; () where there are none to choose.

    `free`: all that nobody holds: what is not chosen of them is the rest. `links`: `nvlink` wants
    the set connected by NVLinks.
    """
    fitting = sorted(eligible)
    if not 0 < count <= len(fitting):
        return ()
    everything = frozenset(free)
    candidates = (
        combinations(fitting, count)
        if len(fitting) <= EXACT_GPUS_MAX
        else _grown(linkage, fitting, count)
    )
    best: tuple[Score, tuple[object, ...]] | None = None
    chosen: tuple[int, ...] = ()
    for candidate in candidates:  # in ascending order: the first of equals has the lowest indices
        taken = frozenset(candidate)
        if links == "nvlink" and len(components(linkage.machine, taken)) > 1:
            continue
        score = linkage.score(taken)
        if best is not None and score < best[0]:
            continue
        value = (score, linkage.usefulness(everything - taken))
        if best is None or value > best:
            best, chosen = value, tuple(candidate)
    return chosen


def _grown(linkage: Linkage, fitting: list[int], count: int) -> list[tuple[int, ...]]:
    """Candidates of a large machine: from every GPU, add what is best to add; O(n² · count)."""
    found: dict[tuple[int, ...], None] = {}
    for seed in fitting:
        taken = {seed}
        while len(taken) < count:
            left = [index for index in fitting if index not in taken]
            taken.add(max(left, key=lambda one: (linkage.score(frozenset({*taken, one})), -one)))
        found[tuple(sorted(taken))] = None
    return sorted(found)


# --- cores ------------------------------------------------------------------------------------


def choose_cores(machine: Machine, held: Held, count: int, near: Sequence[int]) -> tuple[int, ...]:
    """Whole cores with at least `count` threads, as CPUs ascending; () where there are too few.

    From one domain if one has enough: first of those in `near` (the GPUs'), then the one that is
    left fullest. Else from `near` and then by distance. Within a domain, cores of one L3 first.
    """
    free = {d.id: held.free_cores(d) for d in machine.domains.values()}
    sizes = {number: sum(map(len, cores)) for number, cores in free.items()}
    if sum(sizes.values()) < count:
        return ()
    enough = [number for number, size in sizes.items() if size >= count]
    if enough:
        home = min(enough, key=lambda n: (_nearness(near, n), sizes[n], n))
        return _take(_by_cache(machine, free[home], count), count)
    first = min(sizes, key=lambda n: (_nearness(near, n), -sizes[n], n))
    order = sorted(sizes, key=lambda n: (_nearness(near, n), _distance(machine, first, n), n))
    return _take([core for number in order for core in free[number]], count)


def _nearness(near: Sequence[int], domain: int) -> int:
    return near.index(domain) if domain in near else len(near)


def _distance(machine: Machine, one: int, other: int) -> int:
    return machine.domains[one].distances.get(other, 0)


def _by_cache(machine: Machine, cores: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Cores in an order that uses few L3 caches: the fullest one that suffices, else the emptiest.

    L3 caches that cannot be told apart are one.
    """
    groups: dict[int, list[tuple[int, ...]]] = {}
    caches = machine.last_level
    for core in cores:
        groups.setdefault(caches.get(core[0], -1), []).append(core)
    sizes = {cache: sum(map(len, group)) for cache, group in groups.items()}
    enough = [cache for cache, size in sizes.items() if size >= count]
    if enough:
        return groups[min(enough, key=lambda cache: (sizes[cache], cache))]
    order = sorted(groups, key=lambda cache: (-sizes[cache], cache))
    return [core for cache in order for core in groups[cache]]


def _take(cores: list[tuple[int, ...]], count: int) -> tuple[int, ...]:
    taken: list[int] = []
    for core in cores:
        if len(taken) >= count:
            break
        taken += core
    return tuple(sorted(taken))


# --- all of it --------------------------------------------------------------------------------


class Demand(NamedTuple):
    """What one job asks of a node's devices."""

    ask: Ask
    gpus: int
    cpu_millis: int
    memory_bytes: int


def choose(linkage: Linkage, room: Room, demand: Demand) -> Grant | None:
    """The grant for one job in this room; None where it does not fit."""
    ask, count = demand.ask, demand.gpus
    if lacking(room, ask, count, demand.cpu_millis, demand.memory_bytes):
        return None
    if not ask.single_numa:
        return _grant(linkage, room, demand, None)
    homes = [
        domain
        for domain in room.machine.domains.values()
        if fits_domain(room, domain, ask, count, demand.cpu_millis, demand.memory_bytes)
    ]
    grants = [(_grant(linkage, within(room, home.id), demand, home), home) for home in homes]
    return max(grants, key=lambda one: _worth(linkage, room, *one))[0]


def _worth(
    linkage: Linkage, room: Room, grant: Grant, home: Domain
) -> tuple[Score, tuple[object, ...], int, int]:
    """Of one domain among several: its GPUs, what they leave, then the fullest domain."""
    taken = frozenset(grant.gpus)
    rest = frozenset(room.gpus) - taken
    useful = linkage.usefulness(rest) if taken else ()
    return linkage.score(taken), useful, -room.held.free_millis(home), -home.id


def _grant(linkage: Linkage, room: Room, demand: Demand, home: Domain | None) -> Grant:
    machine, ask = room.machine, demand.ask
    grant = Grant(mems=() if home is None else (home.id,))
    near: list[int] = [] if home is None else [home.id]
    if ask.gpu_profile:
        parts = _choose_mig(room, ask, demand.gpus)
        grant = grant._replace(mig=parts)
        near += sorted({machine.mig[uuid][0].numa_node for uuid in parts})
    elif ask.shares:
        share = min(
            share_candidates(room, ask),
            key=lambda one: (1000 - room.held.shares.get(one.gpu, (0, 0))[0], one.gpu),
        )
        grant = grant._replace(share=share)
        near.append(machine.numa_of(share.gpu))
    elif demand.gpus:
        eligible = [index for index in room.gpus if machine.eligible(index, ask)]
        gpus = choose_gpus(linkage, room.gpus, eligible, demand.gpus, ask.gpu_links)
        grant = grant._replace(gpus=gpus)
        near += _domains_of(machine, gpus)
    if ask.pinned:
        held = room.held if home is None else _only(room, home)
        cpus = choose_cores(machine, held, demand.cpu_millis // 1000, near)
        grant = grant._replace(cpus=cpus)
    return grant


def _only(room: Room, home: Domain) -> Held:
    """As if all cores of other domains were held."""
    held = room.held.copy()
    for domain in room.machine.domains.values():
        if domain.id != home.id:
            held.cpus |= domain.cpus
    return held


def _domains_of(machine: Machine, gpus: Sequence[int]) -> list[int]:
    """Domains of these GPUs, the one with the most of them first."""
    numbers = [machine.numa_of(index) for index in gpus]
    return sorted(set(numbers), key=lambda number: (-numbers.count(number), number))


def _choose_mig(room: Room, ask: Ask, count: int) -> tuple[str, ...]:
    """Instances of GPUs that have the fewest free ones, in the order of their place."""
    free = [uuid for uuid in room.machine.mig if uuid not in room.held.mig]
    parents = [room.machine.mig[uuid][0].index for uuid in free]

    def rank(uuid: str) -> tuple[int, int, int, str]:
        gpu, part = room.machine.mig[uuid]
        return parents.count(gpu.index), gpu.index, part.start, uuid

    matching = [uuid for uuid in free if mig_matches(room.machine, uuid, ask)]
    return tuple(sorted(matching, key=rank)[:count])
