"""GPUs, cores and NUMA domains of a node: what a job asks of them, what attempts hold of them.

Derived from `NodeSeen.topology` and the reservations, so that every reader of the ledger can tell
which device is whose and why a job fits nowhere. Which of several devices is *best* is the
scheduler's business (`controlplane.core.devices`); whether any would do is answered here.
"""

from collections.abc import Iterable
from typing import NamedTuple

from idl.jobs import Resources
from idl.topology import GpuInfo, GpuShare, MigInstance, Topology, parse_cpu_list
from idl.units import format_bytes


class Ask(NamedTuple):
    """What a job asks beyond CPU time, memory and a number of GPUs."""

    gpu_model: str
    gpu_memory_bytes_min: int
    gpu_profile: str
    gpu_links: str
    share_millis: int
    share_memory_bytes: int
    pinned: bool
    single_numa: bool

    @property
    def shares(self) -> bool:
        """A part of one GPU instead of whole ones."""
        return bool(self.share_millis or self.share_memory_bytes)


SHAREABLE = ("", "default")
"""Compute modes in which several processes may use a GPU at once."""
PLAIN = Ask("", 0, "", "any", 0, 0, False, False)


def ask_of(resources: Resources) -> Ask:
    """Equal for jobs that ask the same; PLAIN for most."""
    return Ask(
        resources.gpu_model.lower(), resources.gpu_memory_bytes_min, resources.gpu_profile.lower(),
        resources.gpu_links, resources.gpu_share_millis, resources.gpu_share_memory_bytes,
        resources.cpu_pinning == "cores", resources.numa == "single",
    )  # fmt: skip


class Grant(NamedTuple):
    """What an attempt gets; fields as in `idl.ledger.Assigned`."""

    gpus: tuple[int, ...] = ()
    mig: tuple[str, ...] = ()
    share: GpuShare | None = None
    cpus: tuple[int, ...] = ()
    mems: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Nothing but whole GPUs, if any."""
        return not (self.mig or self.share or self.cpus or self.mems)


NOTHING = Grant()


class Domain(NamedTuple):
    """One NUMA domain with CPUs. `cores`: threads of each core, lowest first."""

    id: int
    cpus: frozenset[int]
    cores: tuple[tuple[int, ...], ...]
    memory_bytes: int
    distances: dict[int, int]


class Machine:
    """A node's topology, looked up by index. Built when the node is seen; never changes."""

    def __init__(self, topology: Topology, gpus: Iterable[int]) -> None:
        self.topology = topology
        self.whole = {gpu.index: gpu for gpu in topology.gpus if gpu.index in set(gpus)}
        """GPUs offered whole, by index."""
        self.mig: dict[str, tuple[GpuInfo, MigInstance]] = {
            part.uuid: (gpu, part)
            for gpu in topology.gpus
            if gpu.mig_mode and not gpu.unhealthy
            for part in gpu.mig
        }
        self.place = {gpu.index: at for at, gpu in enumerate(topology.gpus)}
        """Row of a GPU in the matrices."""
        self.graph = (
            tuple((gpu.index, gpu.numa_node) for gpu in self.whole.values()),
            tuple(self.place.items()), topology.nvlinks, topology.pcie,
        )  # fmt: skip
        """All that tells one set of whole GPUs from another; equal for machines built alike."""
        self.domains = {domain.id: domain for domain in _domains(topology)}
        self.last_level = _last_level(topology)
        """CPU → number of its last-level cache, where several CPUs share one."""
        self.cores = {core[0]: core for d in self.domains.values() for core in d.cores}
        """Every core by its first thread."""

    def links(self, one: int, other: int) -> int:
        """NVLinks between two GPUs, by index; 0 where the node did not tell."""
        return _at(self.topology.nvlinks, self.place.get(one, -1), self.place.get(other, -1))

    def pcie(self, one: int, other: int) -> int:
        """PCIe level between two GPUs, by index."""
        return _at(self.topology.pcie, self.place.get(one, -1), self.place.get(other, -1))

    def eligible(self, index: int, ask: Ask) -> bool:
        """Whether this whole GPU is of the kind that is asked for."""
        gpu = self.whole.get(index)
        if gpu is None:  # a node that reports indices alone
            return not (ask.gpu_model or ask.gpu_memory_bytes_min)
        return (
            ask.gpu_model in gpu.product_name.lower()
            and gpu.memory_bytes >= ask.gpu_memory_bytes_min
        )

    def numa_of(self, index: int) -> int:
        """Domain of a GPU; -1 unknown."""
        gpu = self.whole.get(index)
        return -1 if gpu is None else gpu.numa_node


def _at(matrix: tuple[tuple[int, ...], ...], row: int, column: int) -> int:
    known = 0 <= row < len(matrix) and 0 <= column < len(matrix[row])
    return matrix[row][column] if known else 0


def _last_level(topology: Topology) -> dict[int, int]:
    shared = [cache for cache in topology.caches if cache.shared_by]
    if not shared:
        return {}
    last = max(shared, key=lambda cache: cache.level)
    return {
        cpu: number for number, cpus in enumerate(last.shared_by) for cpu in parse_cpu_list(cpus)
    }


def _domains(topology: Topology) -> list[Domain]:
    ids = [domain.id for domain in topology.numa]
    return [
        Domain(
            domain.id, frozenset(parse_cpu_list(domain.cpus)), domain.cores, domain.memory_bytes,
            dict(zip(ids, domain.distances, strict=False)),
        )
        for domain in topology.numa
        if domain.cpus
    ]  # fmt: skip


class Held:
    """What attempts hold of one node's devices, cores and domains; counted, not remembered whose.

    Memory and CPU time of a domain count those attempts only that are bound to it; the others may
    use any domain and are counted by the node as a whole.
    """

    __slots__ = ("bound_bytes", "bound_millis", "cpus", "gpus", "mig", "shares")

    def __init__(self) -> None:
        self.gpus: set[int] = set()
        self.mig: set[str] = set()
        self.shares: dict[int, tuple[int, int]] = {}
        """By GPU: (thousandths, bytes) given away."""
        self.cpus: set[int] = set()
        self.bound_millis: dict[int, int] = {}
        self.bound_bytes: dict[int, int] = {}

    def copy(self) -> "Held":
        """One to plan with."""
        other = Held()
        other.gpus, other.mig, other.cpus = set(self.gpus), set(self.mig), set(self.cpus)
        other.shares = dict(self.shares)
        other.bound_millis, other.bound_bytes = dict(self.bound_millis), dict(self.bound_bytes)
        return other

    def add(self, grant: Grant, cpu_millis: int, memory_bytes: int, sign: int = 1) -> None:
        """Counts one attempt's grant in, or out with `sign` -1."""
        if sign > 0:
            self.gpus.update(grant.gpus)
            self.mig.update(grant.mig)
            self.cpus.update(grant.cpus)
        else:
            self.gpus.difference_update(grant.gpus)
            self.mig.difference_update(grant.mig)
            self.cpus.difference_update(grant.cpus)
        if grant.share is not None:
            share = grant.share
            millis, size = self.shares.get(share.gpu, (0, 0))
            now = (millis + sign * share.millis, size + sign * share.memory_bytes)
            self.shares[share.gpu] = now
            if now == (0, 0):
                del self.shares[share.gpu]
        for domain in grant.mems:
            millis = 0 if grant.cpus else cpu_millis
            self.bound_millis[domain] = self.bound_millis.get(domain, 0) + sign * millis
            self.bound_bytes[domain] = self.bound_bytes.get(domain, 0) + sign * memory_bytes

    def problem(self, machine: Machine, grant: Grant, cpu_millis: int, memory_bytes: int) -> str:
        """Why `grant` cannot be given beside what is held, or "" (invariant 5)."""
        if set(grant.gpus) & (self.gpus | self.shares.keys()):
            return "a GPU is held already"
        if not set(grant.mig) <= machine.mig.keys() or set(grant.mig) & self.mig:
            return "a MIG instance is held already or not offered"
        if grant.share is not None and not self.share_fits(machine, grant.share):
            return "a GPU share is too large"
        if grant.cpus:
            cores = {cpu for core in machine.cores.values() if set(core) & set(grant.cpus)
                     for cpu in core}  # fmt: skip
            if cores != set(grant.cpus) or cores & self.cpus:
                return "CPUs are held already, unknown, or not whole cores"
        if len(grant.mems) > 1 or (grant.mems and grant.mems[0] not in machine.domains):
            return "memory of an unknown NUMA domain"
        if grant.mems and not self.domain_fits(machine, grant, cpu_millis, memory_bytes):
            return "the NUMA domain is too small"
        return ""

    def share_fits(self, machine: Machine, share: GpuShare) -> bool:
        """Thousandths and memory are there."""
        gpu = machine.whole.get(share.gpu)
        if gpu is None or share.gpu in self.gpus:
            return False
        millis, size = self.shares.get(share.gpu, (0, 0))
        return millis + share.millis <= 1000 and size + share.memory_bytes <= gpu.memory_bytes

    def domain_fits(
        self, machine: Machine, grant: Grant, cpu_millis: int, memory_bytes: int
    ) -> bool:
        """The domain of a bound attempt has its memory, and its CPU time or cores."""
        domain = machine.domains[grant.mems[0]]
        if memory_bytes > domain.memory_bytes - self.bound_bytes.get(domain.id, 0):
            return False
        if grant.cpus and not set(grant.cpus) <= domain.cpus:
            return False
        millis = 1000 * len(grant.cpus) if grant.cpus else cpu_millis
        return millis <= self.free_millis(domain)

    def free_millis(self, domain: Domain) -> int:
        """CPU time of a domain that neither pinned nor bound attempts hold."""
        return 1000 * len(domain.cpus - self.cpus) - self.bound_millis.get(domain.id, 0)

    def free_cores(self, domain: Domain) -> list[tuple[int, ...]]:
        """Cores that may be pinned, lowest first; what is bound to the domain keeps its time."""
        free = [core for core in domain.cores if not self.cpus.intersection(core)]
        spare = self.free_millis(domain) // 1000
        taken: list[tuple[int, ...]] = []
        for core in free:
            spare -= len(core)
            if spare < 0:
                break
            taken.append(core)
        return taken

    def content(self) -> tuple[object, ...]:
        """To compare two accounts by."""
        bound = {k: (v, self.bound_bytes[k]) for k, v in self.bound_millis.items()}
        present = {k: v for k, v in bound.items() if v != (0, 0)}
        return (self.gpus, self.mig, self.shares, self.cpus, present)


NOTHING_HELD = Held()


def share_on(machine: Machine, index: int, ask: Ask) -> GpuShare:
    """The share that `ask` means on this GPU: what is not said follows from what is.

    Bytes alone take their part of the time too, so that a GPU is never full by one count alone.
    """
    total = machine.whole[index].memory_bytes
    millis = ask.share_millis or min(1000, -(-ask.share_memory_bytes * 1000 // max(total, 1)))
    size = ask.share_memory_bytes or total * ask.share_millis // 1000
    return GpuShare(gpu=index, millis=max(millis, 1), memory_bytes=size)


def mig_matches(machine: Machine, uuid: str, ask: Ask) -> bool:
    """Whether this MIG instance is of the profile, model and size that are asked for."""
    gpu, part = machine.mig[uuid]
    return (
        part.profile.lower() == ask.gpu_profile
        and ask.gpu_model in gpu.product_name.lower()
        and part.memory_bytes >= ask.gpu_memory_bytes_min
    )


def components(machine: Machine, gpus: Iterable[int]) -> list[list[int]]:
    """GPUs that NVLinks connect, directly or through each other, in groups."""
    left = sorted(gpus)
    found = []
    while left:
        group = [left.pop(0)]
        for one in group:
            near = [other for other in left if machine.links(one, other)]
            group += near
            left = [other for other in left if other not in near]
        found.append(sorted(group))
    return found


class Room(NamedTuple):
    """What is free of a node: to see whether a job fits, and to choose from."""

    machine: Machine
    held: Held
    gpus: tuple[int, ...]
    """Whole GPUs that nobody holds."""


def lacking(
    room: Room, ask: Ask, count: int, cpu_millis: int, memory_bytes: int
) -> tuple[str, ...]:
    """What `room` lacks for this job; () where some choice of devices and cores would do.

    Words are stable: `gpus`, `gpu_model`, `gpu_memory`, `gpu_profile`, `gpu_links`, `gpu_share`,
    `cores`, `numa`.
    """
    words = _lacking_gpus(room, ask, count)
    if words:
        return words
    needed = cpu_millis // 1000
    if ask.pinned and not ask.single_numa:
        free = [core for d in room.machine.domains.values() for core in room.held.free_cores(d)]
        if sum(map(len, free)) < needed:
            return ("cores",)
    if ask.single_numa and not any(
        fits_domain(room, domain, ask, count, cpu_millis, memory_bytes)
        for domain in room.machine.domains.values()
    ):
        return ("numa",)
    return ()


def whole_cores_millis(room: Room, cpu_millis: int) -> int:
    """CPU time that goes with whole cores for `cpu_millis`: every thread of them counts.

    Where cores differ in size the least that it can be."""
    threads = cpu_millis // 1000
    sizes = {len(core) for domain in room.machine.domains.values() for core in domain.cores}
    if len(sizes) == 1:
        (size,) = sizes
        threads = -(-threads // size) * size
    return max(cpu_millis, 1000 * threads)


def fits_domain(
    room: Room, domain: Domain, ask: Ask, count: int, cpu_millis: int, memory_bytes: int
) -> bool:
    """Whether one domain has everything that the job asks."""
    held = room.held
    if memory_bytes > domain.memory_bytes - held.bound_bytes.get(domain.id, 0):
        return False
    if ask.pinned:
        if sum(map(len, held.free_cores(domain))) < cpu_millis // 1000:
            return False
    elif cpu_millis > held.free_millis(domain):
        return False
    return not _lacking_gpus(within(room, domain.id), ask, count)


def within(room: Room, domain: int) -> Room:
    """The same room with the GPUs of one domain only; MIG parts of other GPUs count as held."""
    near = tuple(index for index in room.gpus if room.machine.numa_of(index) == domain)
    held = room.held.copy()
    held.mig |= {uuid for uuid, (gpu, _) in room.machine.mig.items() if gpu.numa_node != domain}
    far = [index for index in room.machine.whole if room.machine.numa_of(index) != domain]
    held.gpus.update(far)
    return Room(room.machine, held, near)


def share_candidates(room: Room, ask: Ask) -> list[GpuShare]:
    """Every GPU's share that would do, by index."""
    machine, held = room.machine, room.held
    found = [
        share_on(machine, index, ask)
        for index in sorted({*room.gpus, *held.shares} & machine.whole.keys())
        if machine.eligible(index, ask) and machine.whole[index].compute_mode in SHAREABLE
    ]
    return [share for share in found if held.share_fits(machine, share)]


def _lacking_gpus(room: Room, ask: Ask, count: int) -> tuple[str, ...]:
    if ask.gpu_profile:
        free = [u for u in room.machine.mig if u not in room.held.mig]
        matching = [u for u in free if mig_matches(room.machine, u, ask)]
        return () if len(matching) >= count else ("gpu_profile",)
    if ask.shares:
        return () if share_candidates(room, ask) else ("gpu_share",)
    if not count:
        return ()
    if len(room.gpus) < count:
        return ("gpus",)
    model = [i for i in room.gpus if room.machine.eligible(i, ask._replace(gpu_memory_bytes_min=0))]
    if len(model) < count:
        return ("gpu_model",)
    fitting = [index for index in model if room.machine.eligible(index, ask)]
    if len(fitting) < count:
        return ("gpu_memory",)
    if ask.gpu_links == "nvlink" and all(
        len(group) < count for group in components(room.machine, fitting)
    ):
        return ("gpu_links",)
    return ()


def demand(word: str, ask: Ask, count: int, cpu_millis: int) -> str:
    """One of the words of `lacking`, for people."""
    single = " in one NUMA domain" if ask.single_numa else ""
    match word:
        case "gpus":
            return f"{count} GPUs"
        case "gpu_model":
            return f"{count} GPUs of model {ask.gpu_model!r}"
        case "gpu_memory":
            return f"{count} GPUs with {format_bytes(ask.gpu_memory_bytes_min)} of memory each"
        case "gpu_profile":
            return f"{count} MIG instances of profile {ask.gpu_profile}"
        case "gpu_links":
            return f"{count} GPUs connected by NVLink"
        case "gpu_share":
            size = f", {format_bytes(ask.share_memory_bytes)}" if ask.share_memory_bytes else ""
            return f"a share of one GPU ({ask.share_millis or '?'}/1000{size})"
        case "cores":
            return f"{cpu_millis // 1000} CPUs in whole cores"
        case "numa":
            cpus = f"{cpu_millis / 1000:g} CPUs{' in whole cores' if ask.pinned else ''}"
            return f"{cpus}, its memory{f' and {count} GPUs' if count else ''}{single}"
    return word
