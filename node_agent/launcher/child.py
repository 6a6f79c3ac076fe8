"""What runs between ``clone3`` and ``exec``: the init of a job's pid namespace, and the job itself.

::

    launcher ── clone3(pid, mount, ipc, uts) ──▶ init (pid 1)  joins cgroups, mounts, net ns
                                                   └── fork ──▶ job (pid 2)  drops everything, execs

init keeps no privilege either: after forking it takes the job's uid, no capabilities and the same
seccomp filter, reaps orphans, and reports the job's wait status. When init ends, the kernel kills
every process of the namespace (pid_namespaces(7)), so nothing can outlive the job.

Any failure before exec is reported with its step and leaves by ``_exit``: never a job half inside.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from _socket import MSG_DONTWAIT, SCM_RIGHTS, SOL_SOCKET, sethostname, socket

from node_agent.launcher import kernel, probe, rootfs
from node_agent.launcher.rootfs import StepError

JOB_UID = 1000  # inside; outside it is the slot's uid (root) or the agent's own (userns)
RESULT_NAME = "result"
# Jobs are the first to go when the host itself is out of memory; raising needs no privilege.
OOM_SCORE_ADJ = "600"
# A job may queue this many signals; the per-user default follows the host's memory.
_SIGNALS_PENDING_MAX = 4096
_EXIT_SETUP_FAILED = 125
# Messages of init to the launcher: one letter, then text.
READY, STARTED, ENDED, FAILED, NOT_EXECUTED = "R", "S", "E", "F", "X"
_MESSAGE_MAX = 4096

_PROC_ATTRIBUTES = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
_JOB_FAULTS = {
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


class JobSpec:
    """One job as the agent asked for it."""

    def __init__(self, message: dict[str, object], uid: int, gid: int) -> None:
        self.uid, self.gid = uid, gid
        self.key = str(message["key"])
        self.argv = _strings(message["argv"])
        self.env = {name: str(value) for name, value in _dict(message["env"]).items()}
        self.cwd, self.hostname = str(message["cwd"]), str(message["hostname"])
        self.network = str(message["network"])
        self.devices = _strings(message["devices"])
        self.probe = bool(message.get("probe"))
        number = {name: value for name, value in message.items() if isinstance(value, int)}
        self.memory_bytes, self.cpu_millis = number["memory_bytes"], number["cpu_millis"]
        self.pids_max, self.open_files_max = number["pids_max"], number["open_files_max"]
        self.tmp_bytes, self.shm_bytes = number["tmp_bytes"], number["shm_bytes"]
        self.work_bytes, self.tmp_inodes = number["work_bytes"], number["tmp_inodes"]
        self.wall_ms, self.grace_ms = number["wall_ms"], number["grace_ms"]
        self.result_bytes_max = number["result_bytes_max"]


def _strings(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError("expected a list of strings")
    return [str(item) for item in value]


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
    shared: Shared, spec: JobSpec, control: socket, stdio: list[int], join_fds: list[int]
) -> None:
    """Body of pid 1 of the job's namespace. Never returns: this is a copy of the launcher."""
    code = _EXIT_SETUP_FAILED
    try:
        code = _init(shared, spec, control, stdio, join_fds)
    except StepError as error:
        _send(control, f"{FAILED}{error.step}\t{error.errno}\t{error}")
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
    shared: Shared, spec: JobSpec, control: socket, stdio: list[int], join_fds: list[int]
) -> int:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    with _Step("join cgroup"):
        for fd in join_fds:
            os.write(fd, b"0")
        kernel.unshare(kernel.CLONE_NEWCGROUP)
    keep = [fd for fd in (shared.net_fd, shared.landlock_fd) if fd >= 0]
    with _Step("close descriptors"):
        kernel.close_all_but((control.fileno(), *stdio, *keep))
    proc_fd = _mounts(shared, spec, control)
    with _Step("network namespace"):
        if spec.network != "none":
            pass  # the launcher's own, by the operator's and the plan's explicit wish
        elif shared.net_fd >= 0:
            kernel.setns(shared.net_fd, kernel.CLONE_NEWNET)
        else:
            kernel.unshare(kernel.CLONE_NEWNET)
    # Not dumpable: /proc/1 of the job's namespace belongs to root and cannot be looked into, and
    # the launcher's memory, of which this is a copy, cannot be read (CVE-2019-5736's first half).
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    with _Step("fork"):
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        signals = {signal.SIGCHLD, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        job = kernel.fork_raw()
    if job == 0:
        try:
            control.close()
            _run_job(shared, spec, stdio, proc_fd, status_write)
        finally:  # whatever happened, this copy must never unwind into the launcher's own frames
            os._exit(_EXIT_SETUP_FAILED)
    os.close(status_write)
    for fd in (*stdio, proc_fd):
        os.close(fd)
    with _Step("init privileges"):
        _drop_identity(spec)
        kernel.bounding_set_drop(shared.last_cap)
        kernel.capset(0)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        # Cleared by the change of uid (prctl(2)): set again, then see that the launcher lives.
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        _check_launcher(control)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        # No Landlock here: its signal scope would keep init from passing SIGTERM on to the job.
        kernel.seccomp_install(shared.seccomp)
    return _supervise(control, job, status_read)


def _check_launcher(control: socket) -> None:
    try:
        if control.recv(1, MSG_DONTWAIT) == b"":
            raise OSError(errno.EPIPE, "launcher is gone")
    except BlockingIOError:
        return  # nothing to read, but still connected


def _supervise(control: socket, job: int, status_read: int) -> int:
    """Report exec's success or failure, then reap until the job itself ends."""
    report = os.read(status_read, _MESSAGE_MAX).decode("utf-8", "replace")
    os.close(status_read)
    if report:
        _send(control, report)
        return _EXIT_SETUP_FAILED
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


def _mounts(shared: Shared, spec: JobSpec, control: socket) -> int:
    """The job's private filesystems. Returns a descriptor of a writable /proc for the id maps."""
    with _Step("hostname"):
        sethostname(spec.hostname)
    with _Step("mount proc"):
        proc_fd = kernel.mount_detached("proc", _PROC_ATTRIBUTES)
        visible = kernel.mount_detached("proc", _PROC_ATTRIBUTES | kernel.MOUNT_ATTR_RDONLY)
        _write_at(proc_fd, "self/oom_score_adj", OOM_SCORE_ADJ)
        kernel.umount("/proc")
        kernel.move_mount(visible, "/proc")
        os.close(visible)
    with _Step("mask proc"):
        for path in shared.masked_files:
            kernel.mount("/dev/null", path, "", kernel.MS_BIND)
        empty = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        for path in shared.masked_dirs:
            kernel.mount("masked", path, "tmpfs", empty, "size=4k,nr_inodes=2,mode=555")
    with _Step("devices"):
        if shared.has_devices:
            _devices(spec.devices)
    private = kernel.MS_NOSUID | kernel.MS_NODEV
    owner = f"uid={spec.uid},gid={spec.gid},nr_inodes={spec.tmp_inodes}"
    with _Step("mount private filesystems"):
        kernel.mount(
            "shm", "/dev/shm", "tmpfs", private, f"size={spec.shm_bytes},mode=1777,{owner}"
        )
        kernel.mount("tmp", "/tmp", "tmpfs", private, f"size={spec.tmp_bytes},mode=1777,{owner}")
        kernel.mount("work", "/work", "tmpfs", private, f"size={spec.work_bytes},mode=755,{owner}")
    with _Step("send work directory"):
        work = os.open("/work", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        _send(control, READY, [work])
        os.close(work)
        # The launcher answers; if it died since clone3, before PDEATHSIG was set, this is its end.
        if control.recv(1) != b"g":
            raise OSError(errno.EPIPE, "launcher is gone")
    return proc_fd


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


def _drop_identity(spec: JobSpec) -> None:
    """Become the job's uid, keeping capabilities for the few steps that are left."""
    kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
    if os.geteuid() != spec.uid:
        os.setgroups([])
        os.setresgid(spec.gid, spec.gid, spec.gid)
        os.setresuid(spec.uid, spec.uid, spec.uid)
    needed = 1 << kernel.CAP_SETPCAP | 1 << kernel.CAP_SYS_ADMIN
    kernel.capset(needed)


def _restrict(shared: Shared) -> None:
    """From here on nothing can be gained: no_new_privs, Landlock scope, seccomp last."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if shared.landlock_fd >= 0:
        kernel.landlock_restrict(shared.landlock_fd)
    kernel.seccomp_install(shared.seccomp)


def _run_job(
    shared: Shared, spec: JobSpec, stdio: list[int], proc_fd: int, status_write: int
) -> None:
    """Becomes the job by exec, or reports why not."""
    try:
        _become_job(shared, spec, stdio, proc_fd)
        with _Step("working directory"):
            os.chdir(spec.cwd)
        with _Step("restrict"):
            kernel.close_all_but((status_write, shared.landlock_fd))
            _restrict(shared)
        if spec.probe:
            os.close(status_write)
            os._exit(probe.inside(spec.pids_max))
        _exec(spec)
    except StepError as error:
        kind = FAILED
        if error.step in {"exec", "working directory"} and error.errno in _JOB_FAULTS:
            kind = f"{NOT_EXECUTED}{_JOB_FAULTS[error.errno]}\t"
        os.write(
            status_write, f"{kind}{error.step}\t{error.errno}\t{error}".encode()[:_MESSAGE_MAX]
        )
    except BaseException as error:  # noqa: BLE001 - the last frame of a forked process
        os.write(status_write, f"{FAILED}job\t0\t{type(error).__name__}: {error}".encode())


def _become_job(shared: Shared, spec: JobSpec, stdio: list[int], proc_fd: int) -> None:
    with _Step("stdio"):
        os.setsid()
        # Above 2 first, so that no dup2 lands on one that is still needed.
        high = [os.dup(fd) if fd < 3 else fd for fd in stdio]
        for target, fd in enumerate(high):
            os.dup2(fd, target, inheritable=True)
    with _Step("uid"):
        _drop_identity(spec)
    with _Step("user namespace"):
        if shared.userns:
            # Last, so that every mount belongs to a namespace in which the job can never have a
            # capability, whatever happens to the ones it drops next.
            kernel.unshare(kernel.CLONE_NEWUSER)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else root owns the three files
            _write_at(proc_fd, "self/setgroups", "deny")
            _write_at(proc_fd, "self/uid_map", f"{JOB_UID} {spec.uid} 1")
            _write_at(proc_fd, "self/gid_map", f"{JOB_UID} {spec.gid} 1")
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    with _Step("rlimits"):
        _rlimits(spec)
    with _Step("capabilities"):
        kernel.bounding_set_drop(shared.last_cap)
        kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
        kernel.prctl(kernel.PR_SET_SECUREBITS, kernel.SECUREBITS_LOCKED)
        kernel.capset(0)
    os.umask(0o022)
    for number in range(1, signal.SIGSYS + 1):
        if number not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def _rlimits(spec: JobSpec) -> None:
    """Only ever lowered: raising a hard limit needs CAP_SYS_RESOURCE, which agents often lack."""
    limits = {
        resource.RLIMIT_NOFILE: spec.open_files_max,
        resource.RLIMIT_NPROC: spec.pids_max,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_SIGPENDING: _SIGNALS_PENDING_MAX,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def _exec(spec: JobSpec) -> None:
    program = spec.argv[0]
    if "/" in program:
        candidates = [program]
    else:
        path = spec.env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
        candidates = [f"{folder}/{program}" for folder in path.split(":") if folder]
    worst = OSError(errno.ENOENT, f"no {program!r} in PATH inside the sandbox")
    for candidate in candidates:
        try:
            os.execve(candidate, spec.argv, spec.env)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                worst = error
            elif "/" in program:
                worst = OSError(error.errno, f"{program!r}: {error.strerror} inside the sandbox")
    raise StepError("exec", worst)
