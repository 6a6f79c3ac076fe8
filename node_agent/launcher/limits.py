# ruff: noqa: PTH110, PTH116, PTH123
# pathlib would add a third to the launcher's memory.
"""What a job may use, written into its cgroup files: v2 where v2 holds the controller, else v1.

Pure but for the writing: which file gets which text is a function of the limits (`v2_files`,
`v1_files`), so that a folder in place of a cgroup can test it.
"""

from __future__ import annotations

import os
import stat

from node_agent.launcher.files import rows_of

# CFS bandwidth period; the kernel's default, and long enough that 10 millis stay above its 1 ms.
CPU_PERIOD_US = 100_000
# What init may use before there is a job: its pages (1.5 MB) and those of mounts; less than any
# plan's memory (plan.MEMORY_BYTES_MIN). It starts nobody.
SET_UP_MEMORY_BYTES = 8 << 20
SET_UP_PIDS_MAX = 1
# File systems that live in memory: nothing to throttle behind them.
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "proc", "sysfs", "devtmpfs", "rootfs", "hugetlbfs"})
# Controllers that only some jobs need. On v1 each is a directory of its own to make, join and
# remove (about 0.2 ms a job), so that only jobs that ask for them get one.
ON_DEMAND_V1 = frozenset({"blkio", "cpuset"})


class Limits:
    """The numbers of one job, but for its CPU quota, which begins later.

    0 and () are "no such limit", but for ``swap_bytes`` (0: none).
    """

    def __init__(
        self,
        memory_bytes: int,
        pids_max: int,
        swap_bytes: int = 0,
        io: tuple[int, int] = (0, 0),
        cpus: tuple[int, ...] = (),
        mems: tuple[int, ...] = (),
    ) -> None:
        """``io``: bytes a second, read and written."""
        self.memory_bytes, self.swap_bytes = memory_bytes, swap_bytes
        self.pids_max = pids_max
        self.io_read, self.io_write = io
        self.cpus, self.mems = cpus, mems

    @property
    def on_demand(self) -> frozenset[str]:
        """v1 hierarchies that this job needs beside the usual ones."""
        wanted = {"blkio"} if self.io_read or self.io_write else set()
        return frozenset(wanted | ({"cpuset"} if self.cpus or self.mems else set()))


def number_list(numbers: tuple[int, ...]) -> str:
    """``0,2,3``, as cpuset files and cpu lists are written; cpuset(7), list format."""
    return ",".join(str(number) for number in numbers)


def v2_files(limits: Limits, holds: frozenset[str], disks: list[str]) -> list[tuple[str, str]]:
    """(file, text) to write in order; a name with ``?`` may be missing in this kernel."""
    files: list[tuple[str, str]] = []
    if "memory" in holds:
        files += [
            ("memory.max", str(limits.memory_bytes)),
            ("memory.swap.max?", str(limits.swap_bytes)),
            ("memory.oom.group", "1"),
        ]
    if "pids" in holds:
        files.append(("pids.max", str(limits.pids_max)))
    if "cpuset" in holds:
        if limits.cpus:
            files.append(("cpuset.cpus", number_list(limits.cpus)))
        if limits.mems:
            files.append(("cpuset.mems", number_list(limits.mems)))
    if "io" in holds and (limits.io_read or limits.io_write):
        read, write = limits.io_read or "max", limits.io_write or "max"
        files += [("io.max", f"{disk} rbps={read} wbps={write}") for disk in disks]
    return files


def v1_files(limits: Limits, disks: list[str]) -> dict[str, list[tuple[str, str]]]:
    """As ``v2_files``, by controller."""
    total = limits.memory_bytes + limits.swap_bytes
    throttle = [
        (f"blkio.throttle.{kind}_bps_device", f"{disk} {rate}")
        for kind, rate in (("read", limits.io_read), ("write", limits.io_write))
        for disk in disks
        if rate
    ]
    cpuset = [
        (f"cpuset.{name}", number_list(numbers))
        for name, numbers in (("cpus", limits.cpus), ("mems", limits.mems))
        if numbers
    ]
    return {
        "memory": [
            ("memory.limit_in_bytes", str(limits.memory_bytes)),
            ("memory.memsw.limit_in_bytes?", str(total)),
        ],
        "pids": [("pids.max", str(limits.pids_max))],
        "blkio": throttle,
        "cpuset": cpuset,
    }


def disks_behind(paths: list[str], mountinfo: str) -> tuple[list[str], list[str]]:
    """The whole disks (``major:minor``) behind these paths, and the paths without one, with why.

    A partition cannot be throttled, its disk can (block/blk-cgroup.c). File systems without a
    device number of their own (btrfs) name theirs as the mount's source; overlays and network
    file systems have none.
    """
    disks: set[str] = set()
    unknown: list[str] = []
    for path in paths:
        try:
            number = os.stat(path).st_dev
        except OSError:
            continue  # nothing is shown there
        kind, source = _mount_of(os.path.realpath(path), mountinfo)
        if kind in _IN_MEMORY:
            continue
        device = f"{os.major(number)}:{os.minor(number)}"
        if os.major(number) == 0:
            device = _device_of(source)
        if device:
            disks.add(_whole(device))
        else:
            unknown.append(f"{path} ({ascii(kind)[1:-1]})")  # FUSE's have names of their own
    return sorted(disks), unknown


def _mount_of(path: str, mountinfo: str) -> tuple[str, str]:
    """(file system, source) of the mount that covers ``path``: the deepest, the latest of equals"""
    best, found = -1, ("?", "")
    for line in rows_of(mountinfo):
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].rstrip("/") + "/"
        if f"{path}/".startswith(point) and len(point) >= best:
            kind, source = (*right.split(" "), "", "")[:2]
            best, found = len(point), (kind, source)
    return found


def _device_of(source: str) -> str:
    try:
        facts = os.stat(source) if source.startswith("/dev/") else None
    except OSError:
        return ""
    if facts is None or not stat.S_ISBLK(facts.st_mode):
        return ""
    return f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"


def _whole(device: str) -> str:
    """The disk of a partition; any other device itself."""
    here = f"/sys/dev/block/{device}"
    if not os.path.exists(f"{here}/partition"):
        return device
    with open(f"{here}/../dev", encoding="utf-8") as file:
        return file.read().strip()
