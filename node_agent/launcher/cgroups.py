"""Control groups of jobs, on v2 and on v1 or hybrid hosts.

Layout: ``<own cgroup>/outrider-<instance>.<random>/<job>`` in every hierarchy used. The instance
directory is locked (flock) while its launcher lives; a directory whose lock is free was left behind
by a launcher that died, and the next start sweeps it. Nothing without our prefix is ever touched.
Directories are reached through descriptors, because the launcher pivots away from the host's root.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from node_agent.launcher import devices, limits, usage
from node_agent.launcher.files import (
    keyed_value,
    read_at,
    rows_of,
    write_all,
    write_at,
    write_if_present,
)

PREFIX = "outrider-"
# Where the agent itself moves when its own v2 cgroup must hand controllers to children.
SELF_LEAF = PREFIX + "self"
CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "devices", *sorted(limits.ON_DEMAND_V1))
_CPUS = os.cpu_count() or 1
_V2_WANTED = frozenset({"memory", "pids", "cpu", "cpuset", "io"})
# Killing what a dead launcher left takes one pass per fork it races with; give up after this.
SWEEP_S_MAX = 5.0
_CREATED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Mounted:
    """One cgroup hierarchy of the host: where the process's own cgroup is in it."""

    def __init__(self, controllers: frozenset[str], directory: str) -> None:
        self.controllers = controllers  # empty: the v2 hierarchy
        self.directory = directory


def own_directory(mount_root: str, mount_point: str, own: str) -> str:
    """Directory of cgroup ``own`` below a mount that shows the hierarchy from ``mount_root``."""
    if mount_root != "/" and (own + "/").startswith(mount_root + "/"):
        own = own[len(mount_root) :]
    if own.startswith("/.."):  # outside what this mount shows (a cgroup namespace)
        own = "/"
    return mount_point if own in {"", "/"} else mount_point + own


def find_hierarchies(mountinfo: str, own_cgroups: str, parent: str = "") -> list[Mounted]:
    """Hierarchies we could use, from the texts of /proc/self/{mountinfo,cgroup}.

    ``parent`` overrides the process's own cgroup in every hierarchy.
    """
    own: dict[frozenset[str], str] = {}
    for line in rows_of(own_cgroups):
        _, names, path = line.split(":", 2)
        own[frozenset(names.split(",")) - {""}] = path
    found: list[Mounted] = []
    for line in rows_of(mountinfo):
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(" "), right.split(" ", 2)
        if kind == "cgroup2":
            wanted: frozenset[str] = frozenset()
        elif kind == "cgroup":
            wanted = frozenset(options.split(",")) & frozenset(CONTROLLERS)
            if not wanted:
                continue
        else:
            continue
        if any(mounted.controllers == wanted for mounted in found):
            continue  # the same hierarchy, mounted a second time
        path = parent or _own_path(own, wanted)
        if path.endswith("/" + SELF_LEAF):
            path = path[: -len(SELF_LEAF) - 1] or "/"
        found.append(Mounted(wanted, own_directory(fields[3], fields[4], path)))
    return found


def _own_path(own: dict[frozenset[str], str], wanted: frozenset[str]) -> str:
    for names, path in own.items():
        if wanted <= names and bool(names) == bool(wanted):
            return path
    return "/"


class Group:
    """One directory in one hierarchy."""

    def __init__(self, parent_fd: int, name: str, fd: int = -1) -> None:
        """Makes it, unless it is open already. Raises OSError; it is not there then."""
        if fd < 0:
            os.mkdir(name, 0o755, dir_fd=parent_fd)
            try:
                fd = os.open(name, _CREATED, dir_fd=parent_fd)
            except OSError:
                os.rmdir(name, dir_fd=parent_fd)
                raise
        self.parent_fd, self.name, self.fd = parent_fd, name, fd

    def remove(self) -> bool:
        """True when the directory is gone; False while the kernel still counts a dying task."""
        try:
            os.rmdir(self.name, dir_fd=self.parent_fd)
        except FileNotFoundError:
            pass  # gone already: what we wanted
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        return True


class Remains:
    """What is left of a job once it is dead."""

    def remove(self) -> bool:
        """One try, without waiting. True once nothing is left."""
        raise NotImplementedError


class JobCgroup(Remains):
    """The directories of one job. Never reused: a killed one also kills whoever enters later."""

    def __init__(
        self,
        v2: Group | None,
        v1: dict[str, Group],
        v2_holds: frozenset[str],
        shared: list[Group],
    ) -> None:
        self.v2, self.v1, self._v2_holds, self._shared = v2, v1, v2_holds, shared
        self.oom_event_fd = -1
        self._gone = False

    @property
    def into_fd(self) -> int | None:
        """For CLONE_INTO_CGROUP."""
        return self.v2.fd if self.v2 else None

    def _groups(self) -> list[Group]:
        groups = list({id(group): group for group in self.v1.values()}.values())
        return [*groups, self.v2] if self.v2 else groups

    def hold(self) -> None:
        """From the start: enough for init, which sets the sandbox up alone.

        On v1 nothing is said about swap yet: memory.limit_in_bytes could not be raised above it.
        """
        memory, pids = str(limits.SET_UP_MEMORY_BYTES), str(limits.SET_UP_PIDS_MAX)
        if self.v2 and "memory" in self._v2_holds:
            write_at(self.v2.fd, "memory.max", memory)
        if self.v2 and "pids" in self._v2_holds:
            write_at(self.v2.fd, "pids.max", pids)
        if "pids" in self.v1:
            write_at(self.v1["pids"].fd, "pids.max", pids)
        if "memory" in self.v1:
            write_at(self.v1["memory"].fd, "memory.limit_in_bytes", memory)
            self._watch_oom(self.v1["memory"].fd)

    def limit(self, wanted: limits.Limits, disks: list[str]) -> None:
        """The job's own: v2 files where v2 holds the controller, v1 files elsewhere."""
        if self.v2:
            write_all(self.v2.fd, limits.v2_files(wanted, self._v2_holds, disks))
        for controller, files in limits.v1_files(wanted, disks).items():
            if controller in self.v1:
                write_all(self.v1[controller].fd, files)

    def limit_cpu(self, cpu_millis: int) -> None:
        """The CPU quota: written when the job is about to start, which else paid for its sandbox.

        A new group has the kernel's default period (CPU_PERIOD_US).
        """
        quota_us = cpu_millis * limits.CPU_PERIOD_US // 1000
        if self.v2 and "cpu" in self._v2_holds:
            write_at(self.v2.fd, "cpu.max", f"{quota_us} {limits.CPU_PERIOD_US}")
        if "cpu" in self.v1:
            write_at(self.v1["cpu"].fd, "cpu.cfs_quota_us", str(quota_us))

    def _watch_oom(self, memory_fd: int) -> None:
        """v1 has no OOM group: an eventfd wakes the launcher, which then kills the whole job."""
        control = os.open("memory.oom_control", os.O_RDONLY | os.O_CLOEXEC, dir_fd=memory_fd)
        try:
            self.oom_event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            write_at(memory_fd, "cgroup.event_control", f"{self.oom_event_fd} {control}")
        finally:
            os.close(control)

    def join_fds(self) -> list[int]:
        """Open ``cgroup.procs`` of every v1 directory; the child writes 0 into each to join."""
        distinct = {id(group): group for group in [*self.v1.values(), *self._shared]}.values()
        fds: list[int] = []
        try:
            for group in distinct:
                fds.append(os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=group.fd))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def oom_kills(self) -> int:
        """Tasks of this job that the kernel killed for want of memory."""
        if self.v2 and "memory" in self._v2_holds:
            return keyed_value(read_at(self.v2.fd, "memory.events"), "oom_kill")
        if "memory" in self.v1:
            return keyed_value(read_at(self.v1["memory"].fd, "memory.oom_control"), "oom_kill")
        return 0

    def cpu_us(self) -> int | None:
        """CPU time of all tasks that ever were in the group, in microseconds."""
        if self.v2:  # counted there even where v1 holds the controller
            text = read_at(self.v2.fd, "cpu.stat")
            if text:
                return keyed_value(text, "usage_usec")
        if "cpuacct" in self.v1:
            return int(read_at(self.v1["cpuacct"].fd, "cpuacct.usage") or 0) // 1000
        return None

    def cpus_at_once(self, cpu_millis: int) -> float:
        """CPU seconds that the job can use in a second."""
        capped = "cpu" in self._v2_holds or "cpu" in self.v1
        return min(cpu_millis / 1000, _CPUS) if capped else _CPUS

    def used(self) -> dict[str, object]:
        """What the job used so far, as far as it is counted here (``launcher.usage``)."""
        used = usage.of_v1({name: group.fd for name, group in self.v1.items()})
        return used | usage.of_v2(self.v2.fd, self._v2_holds) if self.v2 else used

    def kill(self) -> None:
        """SIGKILL everything in the group (cgroup.kill, Linux 5.14), besides init's namespace."""
        if self.v2 and not self._gone:
            write_if_present(self.v2.fd, "cgroup.kill", "1")

    def close_watch(self) -> None:
        """Stop watching for OOM."""
        if self.oom_event_fd >= 0:
            os.close(self.oom_event_fd)
            self.oom_event_fd = -1

    def remove(self) -> bool:
        """Remove the directories; False when some task is not quite gone yet."""
        self._gone = all(list(map(Group.remove, self._groups())))
        return self._gone


class Tree:
    """The instance directories of one launcher and what they can hold."""

    def __init__(self) -> None:
        self.v2: Group | None = None
        self.v1: dict[str, Group] = {}
        self.v2_holds: frozenset[str] = frozenset()
        self.disks: list[str] = []  # major:minor, behind what jobs can read
        self.problems: dict[str, list[str]] = {}  # reason -> the hierarchies it keeps from us
        self._locks: list[int] = []
        self._programs: dict[frozenset[str], int] = {}  # device programs, by extra devices
        self._device_numbers: dict[str, devices.Numbers] = {}
        self._base_numbers: list[devices.Numbers] = []

    @property
    def kind(self) -> str:
        """``v2``, ``hybrid``, ``v1`` or ``none``, as shown to people."""
        if self.v1:
            return "hybrid" if self.v2 else "v1"
        return "v2" if self.v2_holds else "none"

    @property
    def holds(self) -> frozenset[str]:
        """Controllers, by their v2 names; ``cpu_time``: the CPU time of a group is counted."""
        names = {"io" if name == "blkio" else name for name in self.v1}
        counted = {"cpu_time"} if self.v2 or "cpuacct" in self.v1 else set()
        return self.v2_holds | names | counted

    def make(self, name: str, on_demand: frozenset[str] = frozenset()) -> JobCgroup:
        """Directories for one job; on failure nothing is left behind.

        ``on_demand``: v1 hierarchies that not every job needs (``limits.ON_DEMAND_V1``).
        """
        made: dict[str, Group] = {}
        by_parent: dict[int, Group] = {}
        shared: list[Group] = []
        v2: Group | None = None
        try:
            for controller, parent in self.v1.items():
                if controller == "devices":  # one device list for all jobs of the instance
                    shared.append(parent)
                    continue
                if controller in limits.ON_DEMAND_V1 - on_demand:
                    continue
                if parent.fd not in by_parent:
                    by_parent[parent.fd] = Group(parent.fd, name)
                    if self.v1.get("cpuset") is parent:
                        inherit_cpuset(parent.fd, by_parent[parent.fd].fd)
                made[controller] = by_parent[parent.fd]
            if self.v2:
                v2 = Group(self.v2.fd, name)
        except OSError:
            for group in by_parent.values():
                group.remove()
            raise
        return JobCgroup(v2, made, self.v2_holds, shared)

    def restrict_devices(self, base: list[str], extra: list[str]) -> str:
        """Device filter for all jobs: ``ebpf``, ``v1``, or ``none`` where neither is allowed."""
        self._base_numbers = [devices.numbers(path) for path in base]
        self._device_numbers = {path: devices.numbers(path) for path in extra}
        if self.v2 and self._attach(self.v2, frozenset(extra)):
            self.drop_if_alone("devices")
            return "ebpf"
        group = self.v1.get("devices")
        if group is None:
            return "none"
        write_at(group.fd, "devices.deny", "a")
        for major, minor in (*self._base_numbers, *self._device_numbers.values()):
            write_at(group.fd, "devices.allow", f"c {major}:{minor} rw")
        return "v1"

    def try_throttle(self) -> None:
        """Write "no limit" for every disk where jobs' limits will be written. Raises OSError: a
        disk that the kernel does not throttle would fail every job that asks for it."""
        if self.v2 and "io" in self.v2_holds:
            for disk in self.disks:
                write_at(self.v2.fd, "io.max", f"{disk} rbps=max wbps=max")
        if "blkio" in self.v1:
            for disk in self.disks:
                write_at(self.v1["blkio"].fd, "blkio.throttle.read_bps_device", f"{disk} 0")

    def drop_if_alone(self, controller: str) -> None:
        """Do without a v1 controller; its hierarchy too, where it has that for itself."""
        unneeded = self.v1.pop(controller, None)
        if unneeded is not None and unneeded not in self.v1.values():
            unneeded.remove()

    def _attach(self, group: Group, extra: frozenset[str]) -> bool:
        try:
            if extra not in self._programs:
                allowed = [self._device_numbers[path] for path in sorted(extra)]
                self._programs[extra] = devices.load([*self._base_numbers, *allowed])
            devices.attach(group.fd, self._programs[extra])
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS}:
                raise
            return False  # not privileged, or a kernel without; what is left is said to people
        return True

    def grant_devices(self, job: JobCgroup, wanted: list[str]) -> None:
        """Narrow one job to its own devices, when any are configured at all."""
        if not (job.v2 and self._device_numbers and self._programs):
            return
        if not self._attach(job.v2, frozenset(wanted)):
            raise OSError(errno.EPERM, "the job's device program could not be attached")

    def remove(self) -> None:
        """Remove the instance directories (all jobs must be gone) and unlock."""
        groups = {id(group): group for group in self.v1.values()}
        for group in [*groups.values(), *([self.v2] if self.v2 else [])]:
            group.remove()
        for fd in self._locks:
            os.close(fd)

    def adopt(self, mounted: Mounted, base_fd: int, name: str) -> None:
        """Make and lock our directory in one hierarchy. Raises OSError."""
        lock = make_locked(base_fd, name)
        self._locks.append(lock)
        group = Group(base_fd, name, os.open(".", _CREATED, dir_fd=lock))
        if "cpuset" in mounted.controllers:
            inherit_cpuset(base_fd, group.fd)
        if mounted.controllers:
            for controller in mounted.controllers:
                self.v1[controller] = group
            return
        self.v2 = group
        if self.v2_holds:
            write_at(group.fd, "cgroup.subtree_control", _enable(self.v2_holds))


def lock_directory(base_fd: int, name: str) -> int:
    """Descriptor of the directory, locked by us. Raises OSError: BlockingIOError where another
    holds it, FileNotFoundError where it is gone, or was another one when it was locked."""
    fd = os.open(name, _CREATED, dir_fd=base_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=base_fd)):
            raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_locked(base_fd: int, name: str) -> int:
    """A new directory, locked. Raises OSError.

    Until it is locked, another launcher that starts may take it for a dead one's and remove it:
    then it is made again.
    """
    deadline = time.monotonic() + SWEEP_S_MAX
    while True:
        try:
            if not _exists(name, base_fd):  # else who sweeps has not removed it yet
                os.mkdir(name, 0o755, dir_fd=base_fd)
            return lock_directory(base_fd, name)
        except (BlockingIOError, FileNotFoundError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def _exists(name: str, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True


def inherit_cpuset(parent_fd: int, fd: int) -> None:
    """v1: a new cpuset is empty, and no task can enter it before it has CPUs and memory nodes."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        write_at(fd, name, read_at(parent_fd, name).strip())


def _enable(controllers: frozenset[str]) -> str:
    return " ".join(f"+{name}" for name in sorted(controllers))


def open_tree(name: str, hierarchies: list[Mounted], own_pids: frozenset[int]) -> Tree:
    """Sweep what dead launchers left, then make this launcher's directories where allowed.

    ``own_pids`` are the agent and the launcher: on v2 they may have to move into a leaf, because a
    cgroup cannot both contain processes and hand out controllers (cgroup-v2, no internal process).
    """
    tree = Tree()
    for mounted in hierarchies:
        what = "/".join(sorted(mounted.controllers)) or "v2"
        try:
            base_fd = os.open(mounted.directory, _CREATED)
        except OSError as error:
            tree.problems.setdefault(error.strerror or "?", []).append(what)
            continue
        try:
            sweep(base_fd)
            if not mounted.controllers:
                tree.v2_holds = _delegated(base_fd, own_pids)
            tree.adopt(mounted, base_fd, name)
        except OSError as error:
            if not mounted.controllers:
                tree.v2_holds = frozenset()
            tree.problems.setdefault(error.strerror or "?", []).append(what)
    tree.drop_if_alone("cpuacct" if tree.v2 else "")  # v2 counts CPU time without any controller
    return tree


def _delegated(base_fd: int, own_pids: frozenset[int]) -> frozenset[str]:
    """Controllers of the v2 hierarchy that children of ``base_fd`` can be given."""
    wanted = frozenset(read_at(base_fd, "cgroup.controllers").split()) & _V2_WANTED
    missing = wanted - frozenset(read_at(base_fd, "cgroup.subtree_control").split())
    if not missing:
        return wanted
    try:
        write_at(base_fd, "cgroup.subtree_control", _enable(missing))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        members = frozenset(int(pid) for pid in read_at(base_fd, "cgroup.procs").split())
        if not members <= own_pids:
            raise
        if SELF_LEAF not in os.listdir(base_fd):  # else from an earlier start
            os.mkdir(SELF_LEAF, 0o755, dir_fd=base_fd)
        for pid in members:
            write_at(base_fd, f"{SELF_LEAF}/cgroup.procs", str(pid))
        write_at(base_fd, "cgroup.subtree_control", _enable(missing))
    return wanted


def sweep(base_fd: int) -> list[str]:
    """Kill and remove instance directories whose launcher is dead. Returns their names."""
    swept = []
    for name in os.listdir(base_fd):
        if not name.startswith(PREFIX) or name == SELF_LEAF:
            continue
        try:
            if not _ours(name, base_fd):
                continue
            fd = lock_directory(base_fd, name)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # its launcher lives, it is gone meanwhile, not a group, or another user's
        try:
            if remove_dead(base_fd, name, fd):
                swept.append(name)
        finally:
            os.close(fd)
    return swept


def _ours(name: str, dir_fd: int) -> bool:
    """Whether we could remove it. Anybody may lock what he can read: one who cannot remove it would
    only keep its own user from doing so. Root can."""
    me = os.geteuid()
    return me == 0 or os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_uid == me


def remove_dead(base_fd: int, name: str, fd: int) -> bool:
    """Kill and remove all below ``name``, for a bounded time. True once it is gone."""
    deadline = time.monotonic() + SWEEP_S_MAX
    while True:
        for job in os.listdir(fd):
            job_fd = _open_directory(job, fd)
            if job_fd >= 0:
                _kill_members(job_fd)
                os.close(job_fd)
                _remove_quietly(job, fd)
        if _remove_quietly(name, base_fd):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)


def _open_directory(name: str, dir_fd: int) -> int:
    try:
        return os.open(name, _CREATED, dir_fd=dir_fd)
    except (NotADirectoryError, FileNotFoundError):
        return -1


def _kill_members(fd: int) -> None:
    write_if_present(fd, "cgroup.kill", "1")
    for pid in read_at(fd, "cgroup.procs").split():
        if pid != "0":  # a process outside our pid namespace
            try:
                os.kill(int(pid), 9)
            except ProcessLookupError:
                continue


def _remove_quietly(name: str, dir_fd: int) -> bool:
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # still busy: the caller tries again until its deadline
    return True
