# ruff: noqa: PTH101, PTH103, PTH120
# pathlib would add a third to the memory that every job's fork copies.
"""What runs between ``clone3`` and ``exec``: the init of a job's pid namespace.

::

    launcher ── clone3(pid, mount, ipc, uts) ──▶ init (pid 1)  cgroups, mounts, drops all
                       ◀── ready ──                │
                       ── the command ──▶          └── posix_spawn ──▶ job (pid 2)

A sandbox is *prepared* from its ``Shape`` alone, before init knows what it is to run, so it can be
made ahead of its job. When init says ready, nothing is left to give up: it has the job's uid, no
capabilities, and the job's Landlock domain and seccomp filter, which the job inherits. It spawns
the job with ``posix_spawn`` (vfork: no second copy of this process), reaps orphans, and reports the
job's wait status. When init ends, the kernel kills every process of the namespace
(pid_namespaces(7)), so nothing can outlive the job.

Any failure before exec is reported with its step and leaves by ``_exit``: never a job half inside.
"""

from __future__ import annotations

import errno
import os
import resource
from _socket import (
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    SCM_RIGHTS,
    SOL_SOCKET,
    sethostname,
    socket,
)

from node_agent.launcher import kernel, probe, rootfs
from node_agent.launcher.images import Images
from node_agent.launcher.rootfs import StepError
from node_agent.launcher.signals import signal

JOB_UID = 1000  # inside; outside it is the slot's uid (root) or the agent's own (userns)
RESULT_NAME = "result"
# Jobs are the first to go when the host itself is out of memory; raising needs no privilege.
OOM_SCORE_ADJ = "600"
# A job may queue this many signals; the per-user default follows the host's memory.
SIGNALS_PENDING_MAX = 4096
_EXIT_SETUP_FAILED = 125
# Messages of init to the launcher: one letter, then text.
READY, STARTED, ENDED, FAILED, NOT_EXECUTED = "R", "S", "E", "F", "X"
_MESSAGE_MAX = 4096
# A command as init receives it; the agent's plan check keeps it well below (COMMAND_BYTES_MAX).
_COMMAND_MAX = 1 << 18
_STDIO_COUNT = 3
# The empty directory of the read-only root, before the job's own filesystem covers it.
_EMPTY_DIR = "/work"
_SIGNALS_RESET = [
    n for n in range(1, int(signal.SIGSYS) + 1) if n not in {signal.SIGKILL, signal.SIGSTOP}
]

_PROC_ATTRIBUTES = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
_NOT_RUN = {
    errno.ENOENT: 127,
    errno.ENOTDIR: 127,
    errno.ELOOP: 127,
    errno.ENAMETOOLONG: 127,
    errno.EACCES: 126,
    errno.EPERM: 126,
    errno.ENOEXEC: 126,
    errno.EISDIR: 126,
    errno.E2BIG: 126,
    errno.EINVAL: 126,
    errno.ETXTBSY: 126,
    errno.ELIBBAD: 126,
}
# Steps that fail by what the job asked for, with the exit code that says so to its owner.
_JOB_FAULTS = {
    "exec": _NOT_RUN,
    "working directory": _NOT_RUN,
    "inputs": dict.fromkeys((errno.ENOSPC, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), 126),
}


class Shared:
    """What is the same for all jobs of this launcher."""

    def __init__(self) -> None:
        self.seccomp = b""
        self.last_cap = 40
        self.userns = True  # the job's own user namespace, entered last
        self.net_fd = -1  # an empty network namespace shared by all jobs; -1: one for each
        self.landlock_fd = -1
        self.masked_files: list[str] = []
        self.masked_dirs: list[str] = []
        self.has_devices = False
        self.holds: frozenset[str] = frozenset()  # cgroup controllers (``cgroups.Tree.holds``)
        self.images = Images()
        self.proc_beneath = True  # the root holds a /proc that a job's own must replace


class Shape:
    """What a sandbox is made from before its job is known. Equal ``facts``: interchangeable."""

    def __init__(self, message: dict[str, object]) -> None:
        self.hostname, self.network = str(message["hostname"]), str(message["network"])
        self.devices = _strings(message["devices"])
        number = {name: value for name, value in message.items() if isinstance(value, int)}
        self.tmp_bytes, self.shm_bytes = number["tmp_bytes"], number["shm_bytes"]
        self.work_bytes, self.tmp_inodes = number["work_bytes"], number["tmp_inodes"]
        self.work_inodes = number["work_inodes"]
        self.io = (number["io_read_bytes_per_s"], number["io_write_bytes_per_s"])
        self.cpus, self.mems = _numbers(message["cpus"]), _numbers(message["mems"])
        self.probe = bool(message.get("probe"))
        self.image = str(message.get("image", ""))
        self.facts = tuple(map(str, vars(self).values()))


class Input:
    """A file to be in /work before the job starts; ``path`` is relative and was checked."""

    FIELDS = 3

    def __init__(self, path: str, size_bytes: int, writable: bool) -> None:
        self.path, self.size_bytes, self.writable = path, size_bytes, writable

    @classmethod
    def told(cls, item: dict[str, object]) -> Input:
        """From the agent's message."""
        return cls(str(item["path"]), int(str(item["size_bytes"])), bool(item["writable"]))

    def fields(self) -> list[str]:
        """As init reads them."""
        return [self.path, str(self.size_bytes), str(int(self.writable))]


class JobSpec:
    """One job as the agent asked for it."""

    def __init__(self, message: dict[str, object]) -> None:
        self.shape = Shape(message)
        self.key, self.cwd = str(message["key"]), str(message["cwd"])
        self.argv = _strings(message["argv"])
        self.env = {name: str(value) for name, value in _dict(message["env"]).items()}
        number = {name: value for name, value in message.items() if isinstance(value, int)}
        self.memory_bytes, self.cpu_millis = number["memory_bytes"], number["cpu_millis"]
        self.pids_max, self.open_files_max = number["pids_max"], number["open_files_max"]
        self.wall_ms, self.grace_ms = number["wall_ms"], number["grace_ms"]
        self.cpu_ms, self.idle_ms = number["cpu_ms"], number["idle_ms"]
        self.swap_bytes = number["swap_bytes"]
        self.result_bytes_max = number["result_bytes_max"]
        self.collects = bool(message["outputs"])
        self.inputs = [Input.told(_dict(item)) for item in _list(message["inputs"])]
        self.lease_until_ms = number.get("lease_until_ms", 0)

    def command(self) -> bytes:
        """What init needs to start the job, as ``_Command`` reads it."""
        counts = (len(self.inputs), len(self.argv))
        numbers = (self.pids_max, self.open_files_max, self.cpu_ms, *counts)
        inputs = [field for given in self.inputs for field in given.fields()]
        head = [self.cwd, *map(str, numbers), *inputs]
        fields = [*head, *self.argv, *(f"{name}={value}" for name, value in self.env.items())]
        if any("\0" in field for field in fields):
            raise OSError(errno.EINVAL, "a command must not contain NUL")
        return "\0".join(fields).encode()


class _Command:
    """The job's command on init's side."""

    def __init__(self, data: bytes) -> None:
        self.cwd, *head, rest = data.split(b"\0", 6)
        self.pids_max, self.open_files_max, self.cpu_ms, inputs, count = map(int, head)
        words = rest.split(b"\0")
        at = inputs * Input.FIELDS
        given = (words[n : n + Input.FIELDS] for n in range(0, at, Input.FIELDS))
        self.inputs = [Input(path.decode(), int(size), bool(int(own))) for path, size, own in given]
        self.argv = words[at : at + count]
        self.env = dict(word.split(b"=", 1) for word in words[at + count :])


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("expected a list")
    return value


def _strings(value: object) -> list[str]:
    return [str(item) for item in _list(value)]


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(int(text) for text in _strings(value))


def _dict(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("expected a mapping")
    return {str(name): item for name, item in value.items()}


class _Step:
    """Names the step in progress; an OSError inside leaves as a StepError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise StepError(self.name, error) from error


def run_init(
    shared: Shared, shape: Shape, ids: tuple[int, int], control: socket, join_fds: list[int]
) -> None:
    """Body of pid 1 of the job's namespace. Never returns: this is a copy of the launcher."""
    code = _EXIT_SETUP_FAILED
    try:
        code = _init(shared, shape, ids, control, join_fds)
    except StepError as error:
        kind = FAILED
        code = _JOB_FAULTS.get(error.step, {}).get(error.errno, code)
        if code != _EXIT_SETUP_FAILED:
            kind = f"{NOT_EXECUTED}{code}\t"
        _send(control, f"{kind}{error.step}\t{error.errno}\t{error}")
    except BaseException as error:  # noqa: BLE001 - the last frame of a forked process
        _send(control, f"{FAILED}init\t0\t{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _send(control: socket, text: str, fds: list[int] | None = None) -> None:
    data = text.encode("utf-8", "replace")[:_MESSAGE_MAX]
    if fds:
        packed = b"".join(fd.to_bytes(4, "little") for fd in fds)
        control.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, packed)])
    else:
        control.send(data)


def _init(
    shared: Shared, shape: Shape, ids: tuple[int, int], control: socket, join_fds: list[int]
) -> int:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    with _Step("join cgroup"):
        for fd in join_fds:
            os.write(fd, b"0")
        if "cpuset" not in shared.holds:
            _bind(shape)
        kernel.unshare(kernel.CLONE_NEWCGROUP)
    with _Step("image"):
        shared.images.enter(shape.image)
    keep = [fd for fd in (shared.net_fd, shared.landlock_fd) if fd >= 0]
    with _Step("close descriptors"):
        kernel.close_all_but((control.fileno(), *keep))
    proc_fd, work_fd = _mounts(shared, shape, ids)
    with _Step("network namespace"):
        if shape.network != "none":
            pass  # the launcher's own, by the operator's and the plan's explicit wish
        elif shared.net_fd >= 0:
            kernel.setns(shared.net_fd, kernel.CLONE_NEWNET)
        else:
            kernel.unshare(kernel.CLONE_NEWNET)
    _give_up(shared, ids, proc_fd)
    with _Step("close descriptors"):
        kernel.close_all_but((control.fileno(), work_fd))
    _send(control, READY, [work_fd])
    os.close(work_fd)
    command, fds = _receive(control)
    if "cpu_time" not in shared.holds and command.cpu_ms:
        _cpu_rlimit(command.cpu_ms)
    os.umask(0o022)
    with _Step("inputs"):
        if command.inputs:
            _place_inputs(command.inputs, fds[_STDIO_COUNT])
            os.close(fds[_STDIO_COUNT])
    return _supervise(control, _spawn(shape, command, fds[:_STDIO_COUNT]))


def _give_up(shared: Shared, ids: tuple[int, int], proc_fd: int) -> None:
    """All privileges, for init and for whatever it will spawn."""
    with _Step("uid"):
        _drop_identity(*ids)
    with _Step("user namespace"):
        if shared.userns:
            # After all mounts, which thereby belong to a namespace in which the job can never have
            # a capability, whatever happens to the ones it drops next.
            kernel.unshare(kernel.CLONE_NEWUSER)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else root owns the three files
            _write_at(proc_fd, "self/setgroups", "deny")
            _write_at(proc_fd, "self/uid_map", f"{JOB_UID} {ids[0]} 1")
            _write_at(proc_fd, "self/gid_map", f"{JOB_UID} {ids[1]} 1")
    with _Step("capabilities"):
        kernel.bounding_set_drop(shared.last_cap)
        kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
        kernel.prctl(kernel.PR_SET_SECUREBITS, kernel.SECUREBITS_LOCKED)
        kernel.capset(0)
    with _Step("restrict"):
        # Not dumpable: /proc/1 of the job's namespace belongs to root and cannot be looked into,
        # and the launcher's memory, of which this is a copy, cannot be read (CVE-2019-5736's first
        # half). The program that exec makes of the job's process is dumpable again.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        # Cleared by the change of uid (prctl(2)). Should the launcher have died before, then
        # waiting for the command is this process's end.
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if shared.landlock_fd >= 0:
            kernel.landlock_restrict(shared.landlock_fd)
        kernel.seccomp_install(shared.seccomp)


def _bind(shape: Shape) -> None:
    """Without a cpuset of ours: where the job starts. It may choose other CPUs itself."""
    if shape.cpus:
        os.sched_setaffinity(0, shape.cpus)
    if shape.mems:
        kernel.set_mempolicy_bind(shape.mems)


def _receive(control: socket) -> tuple[_Command, list[int]]:
    """The job, once there is one; blocks until then. Raises StepError if the launcher is gone."""
    with _Step("command"):
        space = CMSG_LEN(4 * (_STDIO_COUNT + 1))
        data, ancillary, _, _ = control.recvmsg(_COMMAND_MAX, space, MSG_CMSG_CLOEXEC)
        packed = ancillary[0][2] if ancillary else b""
        fds = [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
        if len(fds) < _STDIO_COUNT:
            raise OSError(errno.EPIPE, "the launcher is gone")
        return _Command(data), fds


def _place_inputs(inputs: list[Input], source: int) -> None:
    """Copy the files, which lie one after the other in ``source``, below /work.

    By now init is nobody but the job's own uid, in a file system that nobody else has seen.
    """
    folders = set()
    for given in inputs:
        folder = os.path.dirname(f"/work/{given.path}")
        os.makedirs(folder, 0o755, exist_ok=True)
        if not given.writable:
            folders.add(folder)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(f"/work/{given.path}", flags, 0o644)
        left = given.size_bytes
        while left > 0:
            count = os.sendfile(target, source, None, left)
            if count == 0:
                raise OSError(errno.EIO, "fewer bytes of inputs than promised")
            left -= count
        os.fchmod(target, 0o644 if given.writable else 0o444)
        os.close(target)
    for folder in folders - {"/work"}:
        os.chmod(folder, 0o555)


def _spawn(shape: Shape, command: _Command, stdio: list[int]) -> int:
    """Start the job; returns its pid once exec succeeded."""
    with _Step("rlimits"):
        _rlimits(command)
    with _Step("working directory"):
        os.chdir(command.cwd)
    if shape.probe:
        pid = kernel.fork_raw()
        if pid == 0:
            for target, fd in enumerate(stdio):
                os.dup2(fd, target)
            os._exit(probe.inside(command.pids_max))
    else:
        pid = _exec(command, stdio)
    for fd in stdio:
        os.close(fd)
    return pid


def _supervise(control: socket, job: int) -> int:
    """Report that the job runs, then reap until the job itself ends."""
    _send(control, STARTED)
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            _send(control, f"{FAILED}wait\t{errno.ECHILD}\tthe job vanished")
            return _EXIT_SETUP_FAILED
        if pid == job:
            _send(control, f"{ENDED}{status}")
            return 0
        if pid == 0 and signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) == signal.SIGTERM:
            _terminate_all()


def _terminate_all() -> None:
    try:
        os.kill(-1, signal.SIGTERM)
    except ProcessLookupError:
        return  # the last one just ended


def _mounts(shared: Shared, shape: Shape, ids: tuple[int, int]) -> tuple[int, int]:
    """The job's private filesystems. Returns descriptors: a /proc that is writable, for the id
    maps, and /work, for the launcher."""
    with _Step("hostname"):
        sethostname(shape.hostname)
    with _Step("mount proc"):
        mounted = kernel.mount_detached("proc", _PROC_ATTRIBUTES)
        if shared.proc_beneath:
            kernel.umount("/proc")
        kernel.move_mount(mounted, "/proc")
        os.close(mounted)
        proc_fd = kernel.open_tree(kernel.AT_FDCWD, "/proc", kernel.OPEN_TREE_CLONE)
        kernel.mount_setattr(kernel.AT_FDCWD, "/proc", 0, kernel.MOUNT_ATTR_RDONLY)
        _write_at(proc_fd, "self/oom_score_adj", OOM_SCORE_ADJ)
    with _Step("mask proc"):
        for path in shared.masked_files:
            kernel.mount("/dev/null", path, "", kernel.MS_BIND)
        for path in shared.masked_dirs:
            kernel.mount(_EMPTY_DIR, path, "", kernel.MS_BIND)
    with _Step("devices"):
        if shared.has_devices:
            _devices(shape.devices)
    private = kernel.MS_NOSUID | kernel.MS_NODEV
    owned = f"uid={ids[0]},gid={ids[1]}"
    owner = f"{owned},nr_inodes={shape.tmp_inodes}"
    work = f"size={shape.work_bytes},mode=755,{owned},nr_inodes={shape.work_inodes}"
    with _Step("mount private filesystems"):
        kernel.mount(
            "shm", "/dev/shm", "tmpfs", private, f"size={shape.shm_bytes},mode=1777,{owner}"
        )
        kernel.mount("tmp", "/tmp", "tmpfs", private, f"size={shape.tmp_bytes},mode=1777,{owner}")
        kernel.mount("work", "/work", "tmpfs", private, work)
        work_fd = os.open("/work", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return proc_fd, work_fd


def _devices(wanted: list[str]) -> None:
    """This job's own /dev with its devices; then the staged ones disappear from its view."""
    rootfs.make_dev("/dev", rootfs.DEVICES, list(rootfs.DEVICE_NODES))
    for path in wanted:
        rootfs.bind_device(rootfs.DEVICES + "/" + os.path.relpath(path, "/dev"), path)
    kernel.umount(rootfs.DEVICES)
    kernel.mount_setattr(kernel.AT_FDCWD, "/dev", 0, kernel.MOUNT_ATTR_RDONLY)


def _write_at(dir_fd: int, name: str, text: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _drop_identity(uid: int, gid: int) -> None:
    """Become the job's uid, keeping capabilities for the few steps that are left."""
    kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
    if os.geteuid() != uid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    # Mapping uid 0 into another user namespace takes CAP_SETFCAP (user_namespaces(7), Linux 5.12).
    map_root = 0 if uid else 1 << kernel.CAP_SETFCAP
    kernel.capset(1 << kernel.CAP_SETPCAP | 1 << kernel.CAP_SYS_ADMIN | map_root)


def _cpu_rlimit(cpu_ms: int) -> None:
    """Where nothing counts the group: SIGXCPU for each process, SIGKILL a second later."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    seconds = -(-cpu_ms // 1000)
    if hard != resource.RLIM_INFINITY:
        seconds = min(seconds, hard - 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _rlimits(command: _Command) -> None:
    """Only ever lowered: raising a hard limit needs CAP_SYS_RESOURCE, which agents often lack."""
    limits = {
        resource.RLIMIT_NOFILE: max(_STDIO_COUNT, command.open_files_max),
        resource.RLIMIT_NPROC: command.pids_max + 1,  # init counts, too
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_SIGPENDING: SIGNALS_PENDING_MAX,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def _exec(command: _Command, stdio: list[int]) -> int:
    program = command.argv[0]
    if b"/" in program:
        candidates = [program]
    else:
        path = command.env.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin")
        candidates = [folder + b"/" + program for folder in path.split(b":") if folder]
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio)]
    name = program.decode("utf-8", "replace")
    worst = OSError(errno.ENOENT, f"no {name!r} in PATH inside the sandbox")
    for candidate in candidates:
        try:
            return os.posix_spawn(
                candidate,
                command.argv,
                command.env,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=_SIGNALS_RESET,
            )
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                worst = error
            elif b"/" in program:
                worst = OSError(error.errno, f"{name!r}: {error.strerror} inside the sandbox")
    raise StepError("exec", worst)
