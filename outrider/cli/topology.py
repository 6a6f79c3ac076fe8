"""`nodes --topology`: what a node is made of, as text: domains with what lies in them, matrices."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from idl.topology import PCIE_LEVELS, CacheInfo, GpuInfo, NicInfo, NumaInfo, Topology
from idl.topology import parse_cpu_list as cpus_of
from idl.units import format_bytes

if TYPE_CHECKING:
    from dataplane.core.nodes import Node


def link_word(topology: Topology, row: int, column: int) -> str:
    """As `nvidia-smi topo -m` writes it: NVn where there are NVLinks, else the PCIe level."""
    if row == column:
        return "X"
    links = _at(topology.nvlinks, row, column)
    if links:
        return f"NV{links}"
    level = _at(topology.pcie, row, column)
    return PCIE_LEVELS.get(level, "?") if topology.pcie else "-"


def _at(matrix: tuple[tuple[int, ...], ...], row: int, column: int) -> int:
    return matrix[row][column] if row < len(matrix) and column < len(matrix[row]) else 0


def holders(node: "Node") -> dict[int | str, str]:
    """Who holds what: job by GPU index and by MIG UUID; several jobs that share one by commas."""
    found: dict[int | str, str] = {}
    for job, reservation in node.attempts.items():
        share = reservation.share
        shared = () if share is None else (share.gpu,)
        for device in (*reservation.gpus, *shared, *reservation.mig):
            found[device] = f"{found[device]}, {job}" if device in found else job
    return found


def topology_document(node: "Node") -> dict[str, Any]:
    """One node as `--json` shows it: its topology as recorded, and who holds what."""
    import msgspec

    pinned = {job: list(r.cpus) for job, r in node.attempts.items() if r.cpus}
    return {
        "node": node.name,
        "simulated": node.simulated,
        "topology": msgspec.to_builtins(node.topology),
        "gpus_offered": list(node.capacity.gpus),
        "held": {str(device): job for device, job in holders(node).items()},
        "cpus_pinned": pinned,
    }


def topology_lines(node: "Node") -> Iterator[str]:
    """One node as a tree and its matrices."""
    topology, held = node.topology, holders(node)
    playing = f": plays {topology.profile}, jobs get no device" if node.simulated else ""
    driver = f", driver {topology.driver_version}" if topology.driver_version else ""
    yield f"{node.name}{f' (simulated{playing})' if node.simulated else ''}{driver}"
    if not topology.numa:
        yield "  it told nothing about its topology"
        return
    for domain in topology.numa:
        yield from _domain_lines(node, domain, held)
    strays = [gpu for gpu in topology.gpus if gpu.numa_node not in {d.id for d in topology.numa}]
    for gpu in strays:
        yield from _gpu_lines(gpu, held, "  ")
    if topology.gpu_note:
        yield f"  GPUs: {topology.gpu_note}"
    yield from _distance_lines(topology)
    yield from _matrix_lines(topology)


def _domain_lines(node: "Node", domain: NumaInfo, held: dict[int | str, str]) -> Iterator[str]:
    topology = node.topology
    package = f" (package {domain.package})" if domain.package >= 0 else ""
    threads = {len(core) for core in domain.cores}
    per_core = f" x {threads.pop()} threads" if len(threads) == 1 else ""
    cores = f": {len(domain.cores)} cores{per_core}" if domain.cores else ", not to be pinned"
    memory = format_bytes(domain.memory_bytes)
    yield f"  NUMA {domain.id}{package}  CPUs {domain.cpus or '-'}{cores}, {memory}"
    pinned = sorted(set(cpus_of(domain.cpus)) & node.held.cpus)
    if pinned:
        from idl.topology import format_cpu_list

        yield f"    pinned  {format_cpu_list(pinned)}"
    own = set(cpus_of(domain.cpus))
    for cache in topology.caches:
        yield from _cache_line(cache, own, domain)
    for gpu in topology.gpus:
        if gpu.numa_node == domain.id:
            yield from _gpu_lines(gpu, held, "    ")
    for nic in topology.nics:
        if nic.numa_node == domain.id or (nic.numa_node < 0 and len(topology.numa) == 1):
            yield f"    NIC {nic.name}  {nic.pcie_bus_id}"


def _cache_line(cache: CacheInfo, own: set[int], domain: NumaInfo) -> Iterator[str]:
    name = f"L{cache.level}{cache.kind[0] if cache.kind in ('data', 'instruction') else ''}"
    if not cache.shared_by:
        yield f"    {name} {format_bytes(cache.size_bytes)} per core"
        return
    here = [cpus for cpus in cache.shared_by if own & set(cpus_of(cpus))]
    if here:
        shown = here[0] if len(here) == 1 else f"{here[0]} … {here[-1]}"
        yield f"    {name} {format_bytes(cache.size_bytes)} x {len(here)}  CPUs {shown}"


def _gpu_lines(gpu: GpuInfo, held: dict[int | str, str], indent: str) -> Iterator[str]:
    notes = [f"held by {held[gpu.index]}"] if gpu.index in held else []
    notes += [f"not offered: {gpu.unhealthy}"] if gpu.unhealthy else []
    notes += ["MIG"] if gpu.mig_mode else []
    memory = format_bytes(gpu.memory_bytes)
    facts = f"{gpu.product_name or '?'}  {memory}  {gpu.pcie_bus_id}  {gpu.uuid}"
    yield f"{indent}GPU {gpu.index}  {facts}{'  ' if notes else ''}{', '.join(notes)}"
    for part in gpu.mig:
        note = f"  held by {held[part.uuid]}" if part.uuid in held else ""
        place = f"  slices {part.start}-{part.start + part.size - 1}" if part.size else ""
        size = format_bytes(part.memory_bytes)
        yield f"{indent}  MIG {part.profile}  {size}{place}  {part.uuid}{note}"


def _distance_lines(topology: Topology) -> Iterator[str]:
    if len(topology.numa) < 2:
        return
    yield "  NUMA distances"
    rows = [[str(one.id), *map(str, one.distances)] for one in topology.numa]
    yield from _table(["", *(str(one.id) for one in topology.numa)], rows)


def _matrix_lines(topology: Topology) -> Iterator[str]:
    if not topology.gpus:
        return
    yield "  links: NVn n NVLinks, PIX one PCIe bridge, PXB several, PHB host bridge, NODE, SYS"
    head = ["", *(f"GPU{gpu.index}" for gpu in topology.gpus)]
    head += [nic.name for nic in topology.nics]
    rows = []
    for row, gpu in enumerate(topology.gpus):
        words = [link_word(topology, row, column) for column in range(len(topology.gpus))]
        words += [_nic_word(nic, row) for nic in topology.nics]
        rows.append([f"GPU{gpu.index}", *words])
    yield from _table(head, rows)


def _nic_word(nic: NicInfo, row: int) -> str:
    return PCIE_LEVELS.get(nic.levels[row], "?") if row < len(nic.levels) else "-"


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    for row in [head, *rows]:
        cells = [word.rjust(width) for word, width in zip(row, widths, strict=True)]
        yield "    " + "  ".join(cells).rstrip()
