"""CPU caches and who shares them, from sysfs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from idl.topology import CacheInfo, format_cpu_list, parse_cpu_list
from node_agent.topology.cpu import Core, read_text

_SIZE_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size_bytes(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if number.isdigit() and unit in _SIZE_UNITS:
        return int(number) * _SIZE_UNITS[unit]
    return int(text) if text.isdigit() else 0


def caches(sysfs: Path, cores: tuple[Core, ...]) -> tuple[CacheInfo, ...]:
    """Every kind of cache of these CPUs, by level; none where the kernel does not say."""
    found: dict[tuple[int, str, int], dict[tuple[int, ...], None]] = {}
    cpus = sorted(cpu for core in cores for cpu in core.cpus)
    own = {core.cpus for core in cores}
    allowed = set(cpus)
    for cpu in cpus:
        folder = sysfs / f"devices/system/cpu/cpu{cpu}/cache"
        for index in sorted(folder.glob("index[0-9]*")):
            depth = read_text(index / "level").strip()
            kind = read_text(index / "type").strip().lower()
            size = _size_bytes(read_text(index / "size").strip())
            sharers = allowed & set(parse_cpu_list(read_text(index / "shared_cpu_list")))
            if depth.isdigit() and size:
                one = found.setdefault((int(depth), kind, size), {})
                one[tuple(sorted(sharers or {cpu}))] = None
    return tuple(
        CacheInfo(
            level=level,
            kind=kind,
            size_bytes=size,
            count=len(shared),
            shared_by=() if shared.keys() <= own else tuple(map(format_cpu_list, shared)),
        )
        for (level, kind, size), shared in sorted(found.items())
    )
