"""CPUs and memory of a node, read from a sysfs tree and the process's own limits.

Pure parsing: the caller passes the roots, so that a test passes a folder. What a job can be given
is what this process may use itself: its affinity mask, its cpuset, its memory cgroup.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from idl.topology import parse_cpu_list

# A v1 memory limit at or above this is "no limit" (PAGE_COUNTER_MAX in bytes, page-rounded).
_NO_LIMIT_BYTES = 1 << 62


class Core(msgspec.Struct, frozen=True):
    """One physical core and the hardware threads on it."""

    package: int
    core: int
    cpus: tuple[int, ...]


def read_text(path: Path) -> str:
    """A file's text, empty if it is absent: sysfs differs between kernels and machines.

    Names in it (of cgroups) may be any bytes.
    """
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""


def online_cpus(sysfs: Path) -> tuple[int, ...]:
    """CPUs that are on; empty if the tree does not say."""
    return parse_cpu_list(read_text(sysfs / "devices/system/cpu/online"))


def cores(sysfs: Path, cpus: tuple[int, ...]) -> tuple[Core, ...]:
    """Physical cores with their threads among ``cpus``; without topology, a core per CPU."""
    found: dict[tuple[int, int], list[int]] = {}
    for cpu in cpus:
        folder = sysfs / f"devices/system/cpu/cpu{cpu}/topology"
        package = read_text(folder / "physical_package_id").strip()
        core = read_text(folder / "core_id").strip()
        known = _is_number(package) and _is_number(core)
        key = (int(package), int(core)) if known else (0, cpu)
        found.setdefault(key, []).append(cpu)
    return tuple(
        Core(package=package, core=core, cpus=tuple(threads))
        for (package, core), threads in sorted(found.items())
    )


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdigit()


def meminfo_bytes(text: str, key: str = "MemTotal") -> int:
    """``MemTotal`` of /proc/meminfo or of a NUMA node's meminfo; 0 if absent."""
    for line in text.splitlines():
        words = line.split()
        if f"{key}:" in words:
            return int(words[words.index(f"{key}:") + 1]) * 1024
    return 0


def memory_limit_bytes(cgroup_files: Iterable[str]) -> int | None:
    """The tightest of several limit files' texts (v2 ``max`` and v1's huge number mean none)."""
    limits = [
        int(text)
        for text in (raw.strip() for raw in cgroup_files)
        if text.isdigit() and int(text) < _NO_LIMIT_BYTES
    ]
    return min(limits) if limits else None
