"""NUMA domains: which CPUs and how much memory lie together, and how far apart domains are."""

from __future__ import annotations

from pathlib import Path

import msgspec

from idl.topology import parse_cpu_list
from node_agent.topology.cpu import meminfo_bytes, read_text

# ACPI SLIT: distance of a domain to itself.
_DISTANCE_LOCAL = 10


class NumaDomain(msgspec.Struct, frozen=True):
    """One domain. ``distances`` follows the order of the node's domains (10 is local)."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int
    distances: tuple[int, ...]


def numa_domains(sysfs: Path, cpus: tuple[int, ...], memory_bytes: int) -> tuple[NumaDomain, ...]:
    """Domains that have CPUs or memory; one domain with everything if the kernel knows none.

    A domain's CPUs are cut down to ``cpus`` (those this process may use).
    """
    allowed = set(cpus)
    domains = []
    root = sysfs / "devices/system/node"
    ids = parse_cpu_list(read_text(root / "online"))
    for number in ids:
        folder = root / f"node{number}"
        own = parse_cpu_list(read_text(folder / "cpulist"))
        memory = meminfo_bytes(read_text(folder / "meminfo"))
        distances = tuple(int(word) for word in read_text(folder / "distance").split())
        if own or memory:
            domains.append(
                NumaDomain(
                    id=number,
                    cpus=tuple(cpu for cpu in own if cpu in allowed),
                    memory_bytes=memory,
                    distances=distances,
                )
            )
    if len(domains) == 1:  # then it has all there is, whatever limit or hot-plug says
        return (msgspec.structs.replace(domains[0], memory_bytes=memory_bytes),)
    if domains:
        return tuple(domains)
    whole = NumaDomain(id=0, cpus=cpus, memory_bytes=memory_bytes, distances=(_DISTANCE_LOCAL,))
    return (whole,)
