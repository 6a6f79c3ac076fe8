"""The whole node in one record, from a sysfs root, a proc root and NVML."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from node_agent.topology.cpu import (
    Core,
    cores,
    meminfo_bytes,
    memory_limit_bytes,
    online_cpus,
    read_text,
)
from node_agent.topology.gpu import Gpu, GpuReport, Nvml, connect_nvml, read_gpus
from node_agent.topology.numa import NumaDomain, numa_domains

_MEMORY_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")


class NodeTopology(msgspec.Struct, frozen=True, kw_only=True):
    """What this node has and what of it this process may hand out.

    ``memory_bytes`` is the smaller of the machine's memory and every cgroup limit above us;
    ``cpus`` are online and within our affinity mask (which includes the cpuset).
    """

    cpus_total: int
    cpus: tuple[int, ...]
    cores: tuple[Core, ...]
    numa: tuple[NumaDomain, ...]
    memory_total_bytes: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    nvlinks: tuple[tuple[int, ...], ...] = ()
    gpus_reason: str = ""


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
    limit = memory_limit_bytes(_limit_texts(sysfs, proc))
    memory = total if limit is None else min(total, limit) if total else limit
    report = read_gpus(connect)
    return NodeTopology(
        cpus_total=len(online),
        cpus=cpus,
        cores=cores(sysfs, cpus),
        numa=numa_domains(sysfs, cpus, memory),
        memory_total_bytes=total,
        memory_bytes=memory,
        gpus=_with_numa(report, sysfs),
        nvlinks=report.nvlinks,
        gpus_reason=report.reason,
    )


def _limit_texts(sysfs: Path, proc: Path) -> list[str]:
    """Limit files of our own memory cgroup and of all above it: any of them may bind."""
    texts = []
    for line in read_text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        for root in (sysfs / "fs/cgroup", sysfs / "fs/cgroup/memory"):
            folder = root / path.lstrip("/")
            while folder != root.parent:
                texts += [read_text(folder / name) for name in _MEMORY_LIMIT_FILES]
                folder = folder.parent
    return texts


def _with_numa(report: GpuReport, sysfs: Path) -> tuple[Gpu, ...]:
    """Older drivers have no NUMA query; the PCI device's own sysfs entry knows."""
    completed = []
    for gpu in report.gpus:
        text = read_text(sysfs / f"bus/pci/devices/{gpu.pcie_bus_id}/numa_node").strip()
        known = gpu.numa_node is not None or not text.isdigit()
        completed.append(gpu if known else msgspec.structs.replace(gpu, numa_node=int(text)))
    return tuple(completed)
