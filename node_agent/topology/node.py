"""The whole node in one record, from a sysfs root, a proc root and NVML."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from idl.topology import (
    GpuInfo,
    Matrix,
    NumaInfo,
    Topology,
    format_cpu_list,
    parse_cpu_list,
    parse_cpu_quota,
)
from node_agent.topology.cache import caches
from node_agent.topology.cpu import (
    Core,
    cores,
    meminfo_bytes,
    memory_limit_bytes,
    online_cpus,
    read_text,
)
from node_agent.topology.gpu import GpuReport, read_gpus
from node_agent.topology.numa import NumaDomain, numa_domains
from node_agent.topology.nvml import Nvml, connect_nvml
from node_agent.topology.pcie import PciPlace, level, nics, place_of

_MEMORY_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_CPU_LIMIT_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


class NodeTopology(msgspec.Struct, frozen=True, kw_only=True):
    """What this node has and what of it this process may hand out.

    ``memory_bytes`` is the smaller of the machine's memory and every cgroup limit above us;
    ``cpus`` are online and within our affinity mask (which includes the cpuset); ``cpu_millis`` is
    the smaller of them and every cgroup's quota above us.
    """

    cpus_total: int
    cpus: tuple[int, ...]
    cpu_millis: int
    cores: tuple[Core, ...]
    numa: tuple[NumaDomain, ...]
    memory_total_bytes: int
    memory_bytes: int
    parts: Topology
    """The same as it is reported: domains with their cores, caches, GPUs, links, adapters."""

    @property
    def gpus(self) -> tuple[GpuInfo, ...]:
        """GPUs, in NVML's order."""
        return self.parts.gpus

    @property
    def nvlinks(self) -> Matrix:
        """Links between them."""
        return self.parts.nvlinks

    @property
    def gpus_reason(self) -> str:
        """Why there are none."""
        return self.parts.gpu_note


def read_topology(
    *,
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    affinity: frozenset[int] | None = None,
    connect: Callable[[], Nvml] = connect_nvml,
) -> NodeTopology:
    """Read everything once; cheap enough for start-up, not for every heartbeat."""
    mine = frozenset(os.sched_getaffinity(0)) if affinity is None else affinity
    online = online_cpus(sysfs) or tuple(sorted(mine))
    cpus = tuple(cpu for cpu in online if cpu in mine)
    total = meminfo_bytes(read_text(proc / "meminfo"))
    limit = memory_limit_bytes(_memory_texts(sysfs, proc))
    memory = total if limit is None else min(total, limit) if total else limit
    found = cores(sysfs, cpus)
    domains = numa_domains(sysfs, cpus, memory)
    report = read_gpus(connect)
    places = _places(report, sysfs)
    return NodeTopology(
        cpus_total=len(online),
        cpus=cpus,
        cpu_millis=min([1000 * len(cpus), *filter(None, _cpu_quotas(sysfs, proc))]),
        cores=found,
        numa=domains,
        memory_total_bytes=total,
        memory_bytes=memory,
        parts=Topology(
            numa=tuple(_numa(domain, found) for domain in domains),
            caches=caches(sysfs, found),
            gpus=_with_numa(report, places, domains),
            nvlinks=report.nvlinks,
            pcie=report.pcie or _levels(places),
            nics=nics(sysfs, places),
            driver_version=report.driver_version,
            gpu_note=report.reason,
        ),
    )


def _numa(domain: NumaDomain, found: tuple[Core, ...]) -> NumaInfo:
    own = [core for core in found if set(core.cpus) & set(domain.cpus)]
    packages = {core.package for core in own}
    return NumaInfo(
        id=domain.id,
        cpus=format_cpu_list(domain.cpus),
        memory_bytes=domain.memory_bytes,
        distances=domain.distances,
        cores=tuple(core.cpus for core in own),
        package=packages.pop() if len(packages) == 1 else -1,
    )


def _memory_texts(sysfs: Path, proc: Path) -> Iterator[str]:
    for folder in _cgroups(sysfs, proc, "memory", ("memory",)):
        yield from (read_text(folder / name) for name in _MEMORY_LIMIT_FILES)


def _cpu_quotas(sysfs: Path, proc: Path) -> Iterator[int]:
    for folder in _cgroups(sysfs, proc, "cpu", ("cpu", "cpu,cpuacct")):
        v1 = " ".join(read_text(folder / name) for name in _CPU_LIMIT_FILES)
        yield parse_cpu_quota(read_text(folder / "cpu.max") or v1)


def _cgroups(sysfs: Path, proc: Path, controller: str, mounts: tuple[str, ...]) -> Iterator[Path]:
    """Our own cgroup that may limit something and all above it: any of them may bind."""
    for line in filter(None, read_text(proc / "self/cgroup").split("\n")):
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for root in (sysfs / "fs/cgroup", *(sysfs / "fs/cgroup" / mount for mount in mounts)):
            folder = root / path.lstrip("/")
            while folder != root.parent:
                yield folder
                folder = folder.parent


def _places(report: GpuReport, sysfs: Path) -> tuple[PciPlace, ...]:
    root = sysfs / "bus/pci/devices"
    return tuple(
        place_of(root / gpu.pcie_bus_id) if gpu.pcie_bus_id else PciPlace((), -1)
        for gpu in report.gpus
    )


def _levels(places: tuple[PciPlace, ...]) -> Matrix:
    """PCIe levels by the paths in sysfs, where the driver does not tell."""
    return tuple(
        tuple(0 if i == j else level(one, other) for j, other in enumerate(places))
        for i, one in enumerate(places)
    )


def _with_numa(
    report: GpuReport, places: tuple[PciPlace, ...], domains: tuple[NumaDomain, ...]
) -> tuple[GpuInfo, ...]:
    """The domain whose CPUs are near: by sysfs, by the driver's CPU affinity, by its NUMA query.

    The last comes last: on machines of coherent memory it names the GPU's own memory, a domain
    without CPUs.
    """
    with_cpus = {domain.id for domain in domains if domain.cpus}
    completed = []
    for gpu, place in zip(report.gpus, places, strict=True):
        near = set(parse_cpu_list(gpu.cpus))
        by_affinity = [domain.id for domain in domains if near & set(domain.cpus)]
        found = [place.numa_node, *by_affinity[:1], gpu.numa_node]
        node = next((number for number in found if number in with_cpus), -1)
        completed.append(msgspec.structs.replace(gpu, numa_node=node))
    return tuple(completed)
