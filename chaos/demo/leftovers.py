"""What a run must not leave behind: processes, cgroups, mounts. Compared before and after."""

import os
from pathlib import Path
from typing import Final

import msgspec

from node_agent.launcher.files import read_table, rows_of

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OTHERS_MOUNTS: Final = (
    "/run/netns", "/run/docker", "/run/containerd", "/run/user", "/var/lib/docker",
    "/var/lib/containerd", "/var/lib/containers", "/var/lib/kubelet",
)  # fmt: skip
"""Where `ip netns`, container runtimes and sessions mount while we run; the launcher never does. A
mount bears no mark of whose it is."""


class Leftovers(msgspec.Struct, frozen=True):
    """One look at the machine."""

    processes: frozenset[tuple[int, str]]
    cgroups: frozenset[str]
    mounts: frozenset[str]

    @staticmethod
    def new(before: "Leftovers", after: "Leftovers") -> list[str]:
        """What is there now and was not, in words."""
        return [
            *(f"process left behind: {pid} {c}" for pid, c in after.processes - before.processes),
            *(f"cgroup left behind: {path}" for path in sorted(after.cgroups - before.cgroups)),
            *(f"mount left behind: {line}" for line in sorted(after.mounts - before.mounts)),
        ]


def _processes(mark: str) -> frozenset[tuple[int, str]]:
    """Processes of this run: `mark` is in the environment of each, jobs included."""
    found: set[tuple[int, str]] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # it ended while we looked, or is another user's
        if mark.encode() in environment or mark.encode() in command:
            found.add((int(folder.name), command[:120].decode("utf-8", "replace")))
    return frozenset(found)


def _cgroups(mark: str) -> frozenset[str]:
    folders = (folder for folder, _, _ in os.walk(CGROUP_ROOT))
    return frozenset(folder for folder in folders if mark in Path(folder).name)


def mount_lines(mountinfo: str, own: tuple[str, ...] = ()) -> list[str]:
    """Lines of proc(5)'s mountinfo that may be ours, or whose mount point (field 5) bears a name of
    `own`."""
    return [
        line
        for line in rows_of(mountinfo)
        for point in [line.split()[4]]
        if not point.startswith(OTHERS_MOUNTS) or any(name in point for name in own)
    ]


def mounts_of(mountinfo: str, own: tuple[str, ...] = ()) -> frozenset[str]:
    """Mount points and types (fields 5 and 9) of `mount_lines`."""
    return frozenset(
        f"{line.split()[4]} {line.split(' - ')[1].split()[0]}"
        for line in mount_lines(mountinfo, own)
    )


def look(mark: str, *mounted: str) -> Leftovers:
    """The machine as it is; `mark` is the run's own name, so that other runs do not count.

    `mounted`: in what it mounts where others do, too.
    """
    mountinfo = read_table("/proc/self/mountinfo")
    return Leftovers(_processes(mark), _cgroups(mark), mounts_of(mountinfo, mounted))
