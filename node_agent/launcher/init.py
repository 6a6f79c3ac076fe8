"""What init does, the first process of a job's pid namespace, as two lists of system calls.

::

    zygote ── clone3(pid, mount, ipc, uts) ──▶ init (pid 1)  cgroups, mounts, drops all
    launcher        ◀── ready ──                 │
                    ── the second list ──▶       └── vfork, execve ──▶ job (pid 2)

The first list, this one, follows from the ``Shape`` of a sandbox alone, so sandboxes are made ahead
of their jobs. When init says ready, nothing is left to give up: it has the job's uid, no
capabilities, and the job's Landlock domain and seccomp filter, which the job inherits. The second
(``command.py``) follows from the job; init receives it by the control socket, starts the job, reaps
orphans, and when the job ends it kills and reaps whatever it left and reports the job's wait
status. When init ends, however that is, the kernel kills every process of the namespace
(pid_namespaces(7)), so nothing can outlive the job.

Any failure before exec is reported by its record and ends init: never a job half inside.
"""

from __future__ import annotations

import os
import resource
import struct

from node_agent.launcher import kernel, rootfs
from node_agent.launcher.board import (
    CONTROL,
    ENDED_WORDS,
    GIVEN,
    LANDLOCK,
    MESSAGE_BYTES_MAX,
    NET,
    SET_UP_BYTES_MAX,
    WORK,
    Board,
)
from node_agent.launcher.child import Shape, Shared
from node_agent.launcher.command import STDIO, limit, lower, parents
from node_agent.launcher.interpreter import ARGUMENT, RECORD_BYTES
from node_agent.launcher.program import At, Program
from node_agent.launcher.signals import signal

JOB_UID = 1000  # inside; outside it is the slot's uid (root) or the agent's own (userns)
# Jobs are the first to go when the host itself is out of memory; raising needs no privilege.
OOM_SCORE_ADJ = "600"
# A job may queue this many signals; the per-user default follows the host's memory.
SIGNALS_PENDING_MAX = 4096

_NAMESPACES = kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_CLONE_VM, _CLONE_VFORK, _CLONE_PARENT = 0x100, 0x4000, 0x8000
_CLONE_ARGS_BYTES = 88
_EXIT_SETUP_FAILED = 125
_MSG_NOSIGNAL, _MSG_CMSG_CLOEXEC = 0x4000, 0x40000000
_MPOL_BIND = 2
_RUSAGE_CHILDREN = -1
_AT_FDCWD = kernel.AT_FDCWD
_SAME_FOR_ALL = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_SIGPENDING: SIGNALS_PENDING_MAX,
    resource.RLIMIT_RTPRIO: 0,
    resource.RLIMIT_NICE: 0,
}
# The empty directory of the read-only root, before the job's own filesystem covers it.
_EMPTY_DIR = "/work"
_PRIVATE = kernel.MS_NOSUID | kernel.MS_NODEV
_DEVICE_FILE, _FOLDER = 0o444, 0o755


def first_list(
    shared: Shared, shape: Shape, ids: tuple[int, int], board: Board, given: Given
) -> tuple[Program, bytes]:
    """The list, to be run by the zygote, whose child init becomes. Raises OSError if it is too
    long."""
    to = Program(board.set_up, board.sink, GIVEN)
    _SetUp(shared, shape, ids, board, to).write(given)
    return to, to.finish(SET_UP_BYTES_MAX)


class Given:
    """The numbers of the descriptors handed over for one sandbox, -1 for none: cgroup.procs to
    join, the cgroup to be born in, the image's mount namespace. The control socket is GIVEN."""

    def __init__(self, join: list[int], cgroup: int | None, image: int) -> None:
        """From the launcher's own descriptors."""
        self.joins = range(GIVEN + 1, GIVEN + 1 + len(join))
        self.cgroup = -1 if cgroup is None else self.joins.stop
        self.image = -1 if image < 0 else self.joins.stop + (cgroup is not None)
        self.facts = (len(join), self.cgroup, self.image)
        """Equal for equal ones."""


class _SetUp:
    """Writes the first list."""

    def __init__(
        self, shared: Shared, shape: Shape, ids: tuple[int, int], board: Board, program: Program
    ) -> None:
        self._shared, self._shape, self._ids = shared, shape, ids
        self._board, self._to = board, program

    def write(self, given: Given) -> None:
        """All of it. The first record is the zygote's; it goes on with its own list."""
        to, board = self._to, self._board
        to.label("born", board.born)
        to.label("stillborn", board.stillborn)
        flags = _NAMESPACES | _CLONE_PARENT | kernel.CLONE_PIDFD
        if given.cgroup >= 0:
            flags |= kernel.CLONE_INTO_CGROUP
        # clone3(2), struct clone_args VER2. With CLONE_PARENT the signal at its end is that of the
        # zygote's own, and init is the launcher's child.
        arguments = to.structure(flags, board.pidfd, 0, 0, 0, 0, 0, 0, 0, 0, max(given.cgroup, 0))
        to.call("clone3", arguments, _CLONE_ARGS_BYTES, store=board.pid, expected=0,
                if_equal="init", if_error="stillborn", otherwise="born")  # fmt: skip
        self._say_failure()
        to.label("init")
        to.step = "init"
        # First: until then the zygote's own way to the launcher has this number.
        to.call("dup3", GIVEN, CONTROL, os.O_CLOEXEC, if_error="out")
        to.call("prctl", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        to.call("rt_sigprocmask", signal.SIG_BLOCK, board.signals, 0, 8)
        self._join(given.joins)
        if given.image >= 0:
            to.step = "image"
            to.call("setns", given.image, kernel.CLONE_NEWNS)
            to.call("unshare", kernel.CLONE_NEWNS)
        to.step = "close descriptors"
        to.call("close_range", GIVEN, 2**32 - 1, 0)
        to.step = "hostname"
        to.call("sethostname", self._shape.hostname, len(self._shape.hostname.encode()))
        proc_fd = self._proc()
        self._devices()
        self._private()
        self._network()
        self._user(proc_fd)
        self._restrict()
        self._wait_for_the_job()
        self._spawn()
        self._supervise()

    def _join(self, joins: range) -> None:
        to, shape = self._to, self._shape
        to.step = "join cgroup"
        for fd in joins:
            to.call("write", fd, "0", 1)
        if "cpuset" not in self._shared.holds:
            # Without a cpuset of ours: where the job starts. It may choose other CPUs itself.
            if shape.cpus:
                mask = _bits(shape.cpus)
                to.call("sched_setaffinity", 0, len(mask), mask)
            if shape.mems:
                mask = _bits(shape.mems)
                to.call("set_mempolicy", _MPOL_BIND, mask, 8 * len(mask) + 1)
        to.call("unshare", kernel.CLONE_NEWCGROUP)

    def _proc(self) -> int:
        """The job's own, read-only and masked. A descriptor of one that is writable, for the id
        maps."""
        to, cloexec, create = self._to, 1, 6
        to.step = "mount proc"
        context = to.opens("fsopen", "proc", cloexec)
        to.call("fsconfig", context, create)
        attributes = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
        mounted = to.opens("fsmount", context, cloexec, attributes)
        to.close(context)
        if self._shared.proc_beneath:
            to.call("umount2", "/proc", kernel.MNT_DETACH)
        self._move(mounted, "/proc")
        proc_fd = to.opens(
            "open_tree", _AT_FDCWD, "/proc", kernel.OPEN_TREE_CLONE | os.O_CLOEXEC
        )  # fmt: skip
        self._attributes(_AT_FDCWD, "/proc", 0, kernel.MOUNT_ATTR_RDONLY)
        self._write(proc_fd, "self/oom_score_adj", OOM_SCORE_ADJ)
        to.step = "mask proc"
        for path in self._shared.masked_files:
            to.call("mount", "/dev/null", path, "", kernel.MS_BIND, 0)
        for path in self._shared.masked_dirs:
            to.call("mount", _EMPTY_DIR, path, "", kernel.MS_BIND, 0)
        return proc_fd

    def _devices(self) -> None:
        """This job's own /dev with its devices; then the staged ones disappear from its view."""
        to = self._to
        if not self._shared.has_devices:
            return
        to.step = "devices"
        to.call("mount", "dev", "/dev", "tmpfs", rootfs.DEV_FLAGS, rootfs.DEV_OPTIONS)
        folders: list[str] = []
        for name in (*rootfs.DEVICE_NODES, *(path[5:] for path in self._shape.devices)):
            for folder in parents(name, folders):
                to.call("mkdirat", _AT_FDCWD, f"/dev/{folder}", _FOLDER)
            # Staged by the launcher, which looked that it is a device, where nobody can change it.
            tree = to.opens(
                "open_tree", _AT_FDCWD, f"{rootfs.DEVICES}/{name}",
                kernel.OPEN_TREE_CLONE | kernel.AT_SYMLINK_NOFOLLOW | os.O_CLOEXEC,
            )  # fmt: skip
            flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
            to.close(to.opens("openat", _AT_FDCWD, f"/dev/{name}", flags, _DEVICE_FILE))
            attributes = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NOEXEC
            self._attributes(tree, "", kernel.AT_EMPTY_PATH, attributes)
            self._move(tree, f"/dev/{name}")
        for name, target in rootfs.DEVICE_LINKS.items():
            to.call("symlinkat", target, _AT_FDCWD, f"/dev/{name}")
        to.call("mkdirat", _AT_FDCWD, "/dev/shm", _FOLDER)
        to.call("umount2", rootfs.DEVICES, kernel.MNT_DETACH)
        self._attributes(_AT_FDCWD, "/dev", 0, kernel.MOUNT_ATTR_RDONLY)

    def _private(self) -> None:
        to, shape = self._to, self._shape
        to.step = "mount private filesystems"
        owned = f"uid={self._ids[0]},gid={self._ids[1]}"
        for name, path, size, inodes, mode in (
            ("shm", "/dev/shm", shape.shm_bytes, shape.tmp_inodes, "1777"),
            ("tmp", "/tmp", shape.tmp_bytes, shape.tmp_inodes, "1777"),
            ("work", "/work", shape.work_bytes, shape.work_inodes, "755"),
        ):
            options = f"size={size},mode={mode},{owned},nr_inodes={inodes}"
            to.call("mount", name, path, "tmpfs", _PRIVATE, options)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        work = to.opens("openat", _AT_FDCWD, "/work", flags, 0)
        assert work == WORK, "the message that hands it over is written for this number"

    def _network(self) -> None:
        to = self._to
        to.step = "network namespace"
        if self._shape.network != "none":
            return  # the launcher's own, by the operator's and the plan's explicit wish
        if self._shared.net_fd >= 0:
            to.call("setns", NET, kernel.CLONE_NEWNET)
        else:
            to.call("unshare", kernel.CLONE_NEWNET)

    def _user(self, proc_fd: int) -> None:
        """Become the job's uid, keeping capabilities for the few steps that are left."""
        to, (uid, gid) = self._to, self._ids
        to.step = "uid"
        to.call("prctl", kernel.PR_SET_KEEPCAPS, 1)
        if os.geteuid() != uid:
            to.call("setgroups", 0, 0)
            to.call("setresgid", gid, gid, gid)
            to.call("setresuid", uid, uid, uid)
        # Mapping uid 0 into another user namespace takes CAP_SETFCAP (user_namespaces(7), Linux
        # 5.12).
        map_root = 0 if uid else 1 << kernel.CAP_SETFCAP
        self._capset(1 << kernel.CAP_SETPCAP | 1 << kernel.CAP_SYS_ADMIN | map_root)
        to.step = "user namespace"
        if self._shared.userns:
            # After all mounts, which thereby belong to a namespace in which the job can never have
            # a capability, whatever happens to the ones it drops next.
            to.call("unshare", kernel.CLONE_NEWUSER)
            to.call("prctl", kernel.PR_SET_DUMPABLE, 1)  # else root owns the three files
            self._write(proc_fd, "self/setgroups", "deny")
            self._write(proc_fd, "self/uid_map", f"{JOB_UID} {uid} 1")
            self._write(proc_fd, "self/gid_map", f"{JOB_UID} {gid} 1")
        to.step = "capabilities"
        for cap in range(self._shared.last_cap + 1):
            to.call("prctl", kernel.PR_CAPBSET_DROP, cap)
        to.call("prctl", kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
        to.call("prctl", kernel.PR_SET_SECUREBITS, kernel.SECUREBITS_LOCKED)
        self._capset(0)

    def _restrict(self) -> None:
        to, shared = self._to, self._shared
        to.step = "rlimits"
        to.call("umask", 0o022)
        for kind, value in _SAME_FOR_ALL.items():
            limit(to, kind, lower(kind, value))
        to.step = "restrict"
        # Not dumpable: /proc/1 of the job's namespace belongs to root and cannot be looked into,
        # and the launcher's memory, of which this is a copy, cannot be read (CVE-2019-5736's first
        # half). The program that exec makes of the job's process is dumpable again.
        to.call("prctl", kernel.PR_SET_DUMPABLE, 0)
        # Cleared by the change of uid (prctl(2)). Should the launcher have died before, then
        # waiting for the command is this process's end.
        to.call("prctl", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        to.call("prctl", kernel.PR_SET_NO_NEW_PRIVS, 1)
        if shared.landlock_fd >= 0:
            to.call("landlock_restrict_self", LANDLOCK, 0)
        # struct sock_fprog: count, pointer
        fprog = to.structure(len(shared.seccomp) // 8, At(to.data(shared.seccomp)))
        to.call("seccomp", kernel.SECCOMP_SET_MODE_FILTER, 0, fprog)

    def _wait_for_the_job(self) -> None:
        to, board = self._to, self._board
        to.step = "command"
        to.call("sendmsg", CONTROL, board.ready, _MSG_NOSIGNAL)
        to.call("close_range", CONTROL + 1, 2**32 - 1, 0)
        to.label("second list", board.job)
        to.label("execute", board.job + RECORD_BYTES)
        to.call("recvmsg", CONTROL, board.command, _MSG_CMSG_CLOEXEC, expected=0,
                if_equal="out", if_error="out", otherwise="second list")  # fmt: skip

    def _spawn(self) -> None:
        """vfork: no second copy of init. The child's last words are in memory that both share."""
        to, board = self._to, self._board
        to.label("spawn")
        to.step = "exec"
        flags = signal.SIGCHLD | (0 if self._shape.probe else _CLONE_VM | _CLONE_VFORK)
        to.call("clone", flags, store=to.following(ARGUMENT + 1), expected=0, if_equal="job",
                otherwise="parent")  # fmt: skip
        to.label("compare")  # the process that ended, and the job's
        to.minus(0, 0, zero="ended", otherwise="wait")
        to.label("parent")
        for fd in STDIO:
            to.call("close", fd)
        to.load(board.tried, store=to.following(ARGUMENT))
        to.minus(0, 0, zero="started")
        to.call("sendto", CONTROL, board.not_executed, MESSAGE_BYTES_MAX, _MSG_NOSIGNAL)
        to.call("exit_group", _EXIT_SETUP_FAILED)
        to.label("job")
        action = to.structure(0, 0, 0, 0)  # struct sigaction: SIG_DFL
        for number in _ignored():
            to.call("rt_sigaction", number, action, 0, 8)
        to.call("rt_sigprocmask", signal.SIG_SETMASK, to.structure(0), 0, 8)
        to.call("setsid")
        for number, fd in enumerate(STDIO):
            to.call("dup3", fd, number, otherwise="execute" if fd == STDIO[-1] else "")

    def _supervise(self) -> None:
        """Report that the job runs, reap until the job itself ends, and kill what it left: its end
        is told when nobody else lives."""
        to, board = self._to, self._board
        to.step = "wait"
        no_hang = 1
        to.label("started")
        to.call("sendto", CONTROL, board.started, 8, _MSG_NOSIGNAL)
        to.label("wait")
        to.call("wait4", -1, board.status, no_hang, store=to.labelled("compare", ARGUMENT),
                expected=0, if_equal="sleep", otherwise="compare")  # fmt: skip
        to.label("sleep")
        to.call("rt_sigtimedwait", board.signals, 0, 0, 8, expected=signal.SIGTERM,
                if_equal="terminate", if_error="wait", otherwise="wait")  # fmt: skip
        to.label("terminate")
        to.call("kill", -1, signal.SIGTERM, if_error="wait", otherwise="wait")
        to.label("ended")  # wait4 says ECHILD once nobody else is in the namespace
        to.call("wait4", -1, 0, no_hang, expected=0, if_equal="kill", if_error="empty",
                otherwise="ended")  # fmt: skip
        to.label("kill")
        to.call("kill", -1, signal.SIGKILL)
        to.label("reap")
        to.call("wait4", -1, if_error="empty", otherwise="reap")
        to.label("empty")
        to.call("getrusage", _RUSAGE_CHILDREN, board.usage)
        to.call("sendto", CONTROL, board.ended, 8 * ENDED_WORDS, _MSG_NOSIGNAL)
        to.call("exit_group", 0)

    def _say_failure(self) -> None:
        """Where every call goes that fails without saying where else."""
        to, board = self._to, self._board
        to.label("failed")
        to.call("sendto", CONTROL, board.failed, 24, _MSG_NOSIGNAL, if_error="out")
        to.label("out")
        to.call("exit_group", _EXIT_SETUP_FAILED)

    # --- pieces -------------------------------------------------------------------------------
    def _write(self, dir_fd: int, name: str, text: str) -> None:
        fd = self._to.opens("openat", dir_fd, name, os.O_WRONLY | os.O_CLOEXEC, 0)
        self._to.call("write", fd, text, len(text))
        self._to.close(fd)

    def _move(self, tree: int, target: str) -> None:
        self._to.call("move_mount", tree, "", _AT_FDCWD, target, kernel.MOVE_MOUNT_F_EMPTY_PATH)
        self._to.close(tree)

    def _attributes(self, fd: int, path: str, flags: int, attributes: int) -> None:
        """Adds mount attributes (mount_setattr(2))."""
        self._to.call("mount_setattr", fd, path, flags, self._to.structure(attributes, 0, 0, 0), 32)

    def _capset(self, allowed: int) -> None:
        """Effective and permitted; inheritable none (capset(2), version 3)."""
        low, high = allowed & 2**32 - 1, allowed >> 32
        header = At(self._to.data(struct.pack("<II", 0x20080522, 0)))
        data = At(self._to.data(struct.pack("<6I", low, low, 0, high, high, 0)))
        self._to.call("capset", header, data)


def _bits(numbers: tuple[int, ...]) -> bytes:
    """A mask as set_mempolicy(2) and sched_setaffinity(2) take it: whole words."""
    size = 8 * (max(numbers) // 64 + 1)
    return sum(1 << number for number in set(numbers)).to_bytes(size, "little")


def _ignored() -> list[int]:
    """Signals that we ignore, which exec would hand on to the job."""
    last = int(signal.SIGSYS)
    return [n for n in range(1, last + 1) if signal.getsignal(n) == signal.SIG_IGN]
