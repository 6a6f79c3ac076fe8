# ruff: noqa: PTH112
# pathlib would add a third to the memory that every job's fork copies.
"""Cgroups where a runtime writes them: our instance directory is all it sees of any hierarchy.

In the launcher's own mount namespace each hierarchy's mount point shows only this instance's
directory. So the runtime makes ``/<job>`` inside it, wherever the agent itself is, also where the
agent's cgroup differs by hierarchy; and crun finds no controller in a hybrid host's v2 hierarchy,
which it would refuse.
"""

from __future__ import annotations

import ctypes
import os

from node_agent.launcher import cgroups, kernel
from node_agent.launcher.cgroups import Group, JobCgroup, Tree
from node_agent.launcher.files import read_at, rows_of

_PROG_QUERY, _ATTACH_TYPE_CGROUP_DEVICE = 16, 6
_CREATED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Stray:
    """Our directory in a hierarchy that we do not use but a runtime does (freezer, systemd, …)."""

    def __init__(self, directory: str, name: str) -> None:
        self.path, self._name = f"{directory}/{name}", name
        self._base = os.open(directory, _CREATED)
        try:
            cgroups.sweep(self._base)
            self._lock = cgroups.make_locked(self._base, name)
        except OSError:
            os.close(self._base)
            raise

    def remove(self) -> None:
        """With what the runtime left in it; what is still busy goes with the next start's sweep."""
        cgroups.remove_dead(self._base, self._name, self._lock)
        os.close(self._lock)
        os.close(self._base)


def own_directories(mountinfo: str, own_cgroups: str, parent: str) -> dict[str, str]:
    """mount point → directory of our own cgroup below it, for every hierarchy."""
    own: dict[frozenset[str], str] = {}
    for line in rows_of(own_cgroups):
        _, names, path = line.split(":", 2)
        own[frozenset(names.split(",")) - {""}] = path
    found: dict[str, str] = {}
    seen: set[str] = set()
    for line in rows_of(mountinfo):
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(" "), right.split(" ", 2)
        if kind not in {"cgroup", "cgroup2"} or fields[2] in seen:
            continue
        seen.add(fields[2])
        words = frozenset(options.split(",")) if kind == "cgroup" else frozenset[str]()
        path = parent or next(
            (path for names, path in own.items() if bool(names) == bool(words) and names <= words),
            "/",
        )
        if path.endswith("/" + cgroups.SELF_LEAF):
            path = path[: -len(cgroups.SELF_LEAF) - 1] or "/"
        found[fields[4]] = cgroups.own_directory(fields[3], fields[4], path)
    return found


def confine(directories: dict[str, str], name: str) -> list[Stray]:
    """Show only ``<own cgroup>/<name>`` at every hierarchy's mount point. Raises OSError.

    The mount namespace must be private to us. Makes that directory where no Tree did.
    """
    strays = []
    for point, directory in directories.items():
        if not os.path.isdir(f"{directory}/{name}"):
            strays.append(Stray(directory, name))
        kernel.mount(f"{directory}/{name}", point, "", kernel.MS_BIND)
    return strays


class Found:
    """What a running job's cgroups were seen to hold."""

    def __init__(self, holds: frozenset[str], device_filter: str) -> None:
        self.holds, self.device_filter = holds, device_filter


def observe(tree: Tree, cgroup: JobCgroup, pid: int, wanted: dict[str, int]) -> Found:
    """Which controllers have process ``pid`` under the limits ``wanted`` (file → value)."""
    holds: set[str] = set()
    for name in tree.holds:
        group = _group(tree, cgroup, name)
        if group is None or str(pid) not in read_at(group.fd, "cgroup.procs").split():
            continue
        texts = {
            file: read_at(group.fd, file).split()[:1] for file in wanted if file.startswith(name)
        }
        if all(text in ([], [str(wanted[file])]) for file, text in texts.items()):
            holds.add(name)
    return Found(frozenset(holds), _device_filter(tree, cgroup))


def _group(tree: Tree, cgroup: JobCgroup, name: str) -> Group | None:
    """The directory that holds a controller, by the names of ``Tree.holds``."""
    if name == "cpu_time":
        return cgroup.v2 or cgroup.v1.get("cpuacct")
    if name in tree.v2_holds:
        return cgroup.v2
    return cgroup.v1.get("blkio" if name == "io" else name)


def _device_filter(tree: Tree, cgroup: JobCgroup) -> str:
    """Whether the runtime's device list is in force: v1's is readable, v2's is a program."""
    shared = tree.v1.get("devices")
    if shared is not None and cgroup.v1:
        name = next(iter(cgroup.v1.values())).name
        text = read_at(shared.fd, f"{name}/devices.list")
        return "v1" if text and "a *:* rwm" not in text else "none"
    if cgroup.v2 is not None and _programs(cgroup.v2.fd):
        return "ebpf"
    return "none"


def _programs(cgroup_fd: int) -> bool:
    """True where a device program is attached to this very cgroup; bpf(2), BPF_PROG_QUERY."""
    ids = (ctypes.c_uint32 * 8)()
    attributes = b"".join(
        (
            cgroup_fd.to_bytes(4, "little"),
            _ATTACH_TYPE_CGROUP_DEVICE.to_bytes(4, "little"),
            bytes(8),
            ctypes.addressof(ids).to_bytes(8, "little"),
            len(ids).to_bytes(4, "little"),
            bytes(4),
        )
    )
    try:
        kernel.bpf(_PROG_QUERY, attributes)
    except OSError:
        return False
    return any(ids)
