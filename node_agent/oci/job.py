# ruff: noqa: PTH101, PTH102, PTH103, PTH112, PTH120, PTH123
# pathlib would add a third to the memory that every job's fork copies.
"""One running job as the OCI launcher sees it: bundle, runtime, container, removal.

::

    launcher ── clone3(pid) ──▶ holder (pid 1 of the job's namespace, no privilege)
        ├── <runtime> run --detach ──▶ the job, joins the namespace, then is ours to reap
        └── <runtime> delete

The launcher is a subreaper (prctl(2)): once the runtime has gone, the job is its child, and its
wait status is exact. A runtime without ``--detach`` here (runsc) is waited for instead, and its
exit code tells of signals as 128 + n.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import time

from node_agent.launcher import devices, kernel
from node_agent.launcher.cgroups import JobCgroup, Remains, Tree
from node_agent.launcher.child import Input, JobSpec, Shape, Shared
from node_agent.launcher.jobs import Job
from node_agent.launcher.limits import CPU_PERIOD_US
from node_agent.oci import config, holder
from node_agent.oci.cgroups import Found, observe
from node_agent.oci.children import Children, kill_group
from node_agent.oci.roots import OciImages
from node_agent.oci.runtime import Runtime, fault_of

_LOG_BYTES_MAX = 1 << 20  # one line may hold the job's command, quoted more than once
# A shell's convention for an exit by signal n, which a runtime in the foreground follows too.
_SIGNALLED = 128
_STDIO_COUNT = 3
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


class OciShared(Shared):
    """What is the same for all jobs of this launcher, besides what the native one shares."""

    def __init__(self, runtime: Runtime, home: str) -> None:
        super().__init__()
        self.runtime = runtime
        self.children: Children
        self.home = home
        self.root = f"{home}/root"
        self.images: OciImages = OciImages(home)
        self.empty = f"{home}/empty"
        self.bundles = f"{home}/bundles"
        self.state = f"{home}/state"
        self.profile: config.Json | None = None
        self.masked: list[str] = []
        self.probe_mounts: list[config.Json] = []
        self.tree = Tree()
        self.found: Found | None = None  # what the self-test's cgroups were seen to hold

    def command(self, *words: str) -> list[str]:
        """The runtime's command line, up to its subcommand and beyond."""
        return [self.runtime.path, *self.runtime.options, "--root", self.state, *words]


class Removal(Remains):
    """What a job leaves: its container's record, its bundle, its cgroup. ``remove`` until True."""

    def __init__(self, cgroup: JobCgroup) -> None:
        self._cgroup, self.bundle = cgroup, ""
        self._children: Children
        self._deleting = -1  # pid of `<runtime> delete`

    def begin(self, shared: OciShared, name: str) -> None:
        """Let the runtime forget the container, in the background. Raises OSError."""
        self._children = shared.children
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            command = shared.command("delete", "--force", name)
            self._deleting = shared.children.know(_spawn(command, [null] * 3))
        finally:
            os.close(null)

    def remove(self) -> bool:
        """One look; never blocks."""
        if self._deleting > 0:
            if self._children.wait(self._deleting) is None:
                return False
            self._deleting = -1
            self._cgroup.kill()  # a helper that a failed runtime left there
            _unmount(f"{self.bundle}/work")
            shutil.rmtree(self.bundle, ignore_errors=True)
        return self._cgroup.remove()


class OciJob(Job):
    """State of one attempt from its bundle to the removal of its container."""

    def __init__(self, shape: Shape, slot: int, cgroup: JobCgroup, name: str) -> None:
        super().__init__(shape, slot, cgroup)
        self._name = name
        self._shared: OciShared
        self._bundle = ""
        self._ids = (-1, -1)
        self._runtime_pid = self._holder_pid = self._holder_fd = -1
        self._container_pid = -1
        self._init_status: int | None = None
        self._wanted: dict[str, int] = {}
        self._processes_max = config.PROCESSES_OF_A_UID_MAX
        self._removal = Removal(cgroup)
        self.spent: list[int] = []  # descriptors of what has ended, to be unwatched and closed

    @property
    def remains(self) -> Remains:
        """The runtime's record and the bundle too."""
        return self._removal

    # --- starting -----------------------------------------------------------------------------
    def launch(self, shared: Shared, ids: tuple[int, int]) -> None:
        """Its bundle, /work and pid namespace. Raises OSError; nothing runs then."""
        assert isinstance(shared, OciShared)
        self._shared, self._ids = shared, ids
        if not shared.runtime.own_kernel:
            self._close_join_fds()  # the runtime puts the job into its cgroups; our init is in none
        self._bundle = self._removal.bundle = f"{shared.bundles}/{self._name}"
        work, shape = f"{self._bundle}/work", self.shape
        try:
            os.makedirs(work, 0o700)
            owned = f"uid={ids[0]},gid={ids[1]},nr_inodes={shape.work_inodes}"
            flags = kernel.MS_NOSUID | kernel.MS_NODEV
            kernel.mount("work", work, "tmpfs", flags, f"size={shape.work_bytes},mode=755,{owned}")
            self.work_fd = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if shared.runtime.holds_namespaces:
                self._hold()
        finally:
            self._theirs.close()

    def _hold(self) -> None:
        """Our own init, which says nothing on its control socket and ends when we close it."""
        pidfd = ctypes.c_int(-1)
        namespaces = kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
        self._holder_pid = kernel.clone3(namespaces, pidfd)
        if self._holder_pid == 0:
            holder.run(self._shared, self._ids, self._theirs, self._shared.empty)
        self._shared.children.know(self._holder_pid)
        self._holder_fd = self.pidfd = pidfd.value

    def assign(self, spec: JobSpec, stdio: list[int], disks: list[str]) -> None:
        """Give the container its job, and start it. Takes ``stdio``, unless it raises OSError."""
        if self._shared.runtime.own_kernel:
            self._processes_max = spec.pids_max
            spec.pids_max += self._shared.runtime.pids_spare
        super().assign(spec, stdio, disks)
        self._spec, self._stdio = None, []  # a command may hold secrets: later inits are copies
        self._wanted = {
            "memory.limit_in_bytes": spec.memory_bytes,
            "memory.max": spec.memory_bytes,
            "pids.max": spec.pids_max + (1 if self._shared.runtime.own_kernel else 0),  # as ours
            "cpu.cfs_quota_us": spec.cpu_millis * CPU_PERIOD_US // 1000,
            "cpu.max": spec.cpu_millis * CPU_PERIOD_US // 1000,
        }
        try:
            if self._placed(spec.inputs, stdio[_STDIO_COUNT:]):
                self._write_config(spec)
                self._start_runtime(spec, stdio[:_STDIO_COUNT])
        except OSError as error:
            self.failure = ("launch", error.errno or 0, str(error))
        finally:
            for fd in stdio:
                os.close(fd)
        if self.failure is not None or self.not_executed is not None:
            self._watch_instead(os.eventfd(1, os.EFD_CLOEXEC))  # readable: it has ended

    def _placed(self, inputs: list[Input], source: list[int]) -> bool:
        """False where they do not fit into the job's own /work, which is the job's fault. Raises
        OSError for any other reason."""
        try:
            if inputs:
                self._place_inputs(inputs, source[0])
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
                raise
            self.not_executed = (126, f"inputs: {error}")
        return self.not_executed is None

    def _place_inputs(self, inputs: list[Input], source: int) -> None:
        """Into a file system that nobody has seen yet; the agent has checked the paths."""
        base, folders = f"{self._bundle}/work", set()
        for given in inputs:
            path = f"{base}/{given.path}"
            folder = os.path.dirname(path)
            _make_folders(base, os.path.dirname(given.path), self._ids)
            if not given.writable:
                folders.add(folder)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(path, flags, 0o644)
            try:
                _copy(source, target, given.size_bytes)
                os.fchmod(target, 0o644 if given.writable else 0o444)
                os.fchown(target, *self._ids)
            finally:
                os.close(target)
        for folder in folders - {base}:
            os.chmod(folder, 0o555)

    def _write_config(self, spec: JobSpec) -> None:
        shared = self._shared
        places = config.Places(
            root=shared.images.root(spec.shape.image, shared.root),
            work=f"{self._bundle}/work",
            ids=self._ids,
            disks=shared.tree.disks,
            cgroup=f"/{self._name}",
            processes_max=self._processes_max,
            namespaces=f"/proc/{self._holder_pid}/ns" if self._holder_pid > 0 else "",
            seccomp=shared.profile,
            masked=shared.masked,
            devices=[_device(path) for path in spec.shape.devices],
            extra_mounts=shared.probe_mounts if spec.shape.probe else [],
        )
        with open(f"{self._bundle}/config.json", "w", encoding="utf-8") as file:
            json.dump(config.build(spec, places), file)

    def _start_runtime(self, spec: JobSpec, stdio: list[int]) -> None:
        shared = self._shared
        words = ["--bundle", self._bundle, "--pid-file", f"{self._bundle}/pid"]
        if shared.runtime.detaches:
            words.append("--detach")
        if shared.runtime.own_kernel:
            self.cgroup.limit_cpu(spec.cpu_millis)
        log = f"{self._bundle}/log"
        command = [*shared.command("--log", log, "--log-format", "json", "run"), *words, self._name]
        hybrid = shared.tree.kind == "hybrid" and not shared.runtime.joins_v2
        whole = shared.runtime.own_kernel or hybrid
        pid = _spawn_in(self.cgroup.into_fd if whole else None, self._join_fds, command, stdio)
        self._close_join_fds()
        self._runtime_pid = shared.children.know_starter(pid, f"{self._bundle}/pid")
        self._watch_instead(os.pidfd_open(self._runtime_pid))
        if not shared.runtime.detaches:
            self.started = True  # it cannot be told from outside; failures are told by the log

    # --- stopping -----------------------------------------------------------------------------
    def _signal(self, number: int) -> None:
        """To everything in the job, by way of its init."""
        if self._runtime_pid > 0 and number == signal.SIGKILL:
            kill_group(self._runtime_pid)  # also its helpers outside of the namespace
        if self._holder_fd >= 0:
            _send(self._holder_fd, number)
        elif self._shared.runtime.detaches:
            return  # it has ended
        elif self._runtime_pid > 0 and number == signal.SIGTERM:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            _spawn(self._shared.command("kill", "--all", self._name, "TERM"), [null] * 3)
            os.close(null)

    # --- the end ------------------------------------------------------------------------------
    def reap(self) -> int | None:
        """One step on whatever ``pidfd`` watches; the job's wait status at its very end."""
        if self.shape.probe:  # nobody else looks meanwhile
            self._look()
            self._shared.children.reap_strangers()
        if self._runtime_pid > 0:
            return self._on_runtime_exit()
        if self._container_pid > 0:
            dead = self._shared.children.wait(self._container_pid)
            if dead is None:
                return None
            self._container_pid, (status, usage) = -1, dead
            if self._shared.runtime.detaches:
                self.usage_cpu_us = int((usage.ru_utime + usage.ru_stime) * 1_000_000)
                self.usage_rss_bytes = usage.ru_maxrss * 1024
                self.status = status
        return self._all_dead(self.status or 0)

    def _on_runtime_exit(self) -> int | None:
        children, starter = self._shared.children, self._runtime_pid
        code = children.wait_starter(starter)
        if code is None:
            return None
        self._runtime_pid = -1
        detached = self._shared.runtime.detaches
        if not detached:
            self._foreground_ended(code)
        if code == 0 or not detached:
            try:
                self._container_pid, fd = children.started(starter)
            except (OSError, ValueError):
                pass  # it named no child of ours: it failed, or has waited for it itself
            else:
                self._watch_instead(fd)
                if detached:
                    self.started = True
                else:
                    _send(fd, signal.SIGKILL)  # whoever held it has ended
                return self.reap()
        children.failed(starter)
        if detached:
            self._blame(code)
        return self._all_dead(self.status or 0)

    def _foreground_ended(self, code: int) -> None:
        failed = fault_of(_read(f"{self._bundle}/log"))
        if code == -signal.SIGKILL and self._out_of_memory():
            self.status = signal.SIGKILL  # with all of its cgroup, by memory.oom.group of v2
        elif code < 0 or failed is not None:
            self._blame(code)
        else:
            number = code - _SIGNALLED
            by_signal = 0 < number < signal.NSIG
            self.status = number if by_signal else code << 8

    def _out_of_memory(self) -> bool:
        try:
            return self.cgroup.oom_kills() > 0
        except (OSError, ValueError):
            return False  # the runtime has removed what counted

    def _blame(self, code: int) -> None:
        """The runtime could not start the job: whose fault that is, from its log."""
        self.started = False
        fault = fault_of(_read(f"{self._bundle}/log"))
        name = self._shared.runtime.name
        if fault is None:
            self.failure = (name, 0, f"exit code {code}, and nothing in its log")
        elif fault.exit_code:
            self.not_executed = (fault.exit_code, fault.text)
        else:
            self.failure = (name, 0, fault.text)

    def _all_dead(self, status: int) -> int | None:
        """The job's first process has ended: now its init, and thereby all of it."""
        if self._init_status is None:
            self._init_status = status
            self.ended_at = time.monotonic()
        if self._holder_pid > 0:
            _send(self._holder_fd, signal.SIGKILL)
            if self._shared.children.wait(self._holder_pid) is None:
                self._watch_instead(self._holder_fd)
                return None
            self._holder_pid = -1
        return self._init_status

    def outcome(self, init_status: int) -> dict[str, object]:
        """A runtime that failed to start a job has removed its cgroups: nothing is left to read."""
        if self.started or self.ended_by:
            try:
                return super().outcome(init_status)
            except (OSError, ValueError) as error:
                self.failure = self.failure or ("usage", 0, str(error))
        wall_ms = int((self.ended_at - self.started_at) * 1000)
        ended: dict[str, object] = {"wall_ms": wall_ms, "cpu_ms": 0, "memory_peak_bytes": 0}
        if self.ended_by:
            return ended | {"cause": self.ended_by, "detail": self.why}
        if self.not_executed is not None:
            code, text = self.not_executed
            return ended | {"cause": "exited", "exit_code": code, "detail": text}
        step, _, text = self.failure or ("runtime", 0, "ended without a word")
        return ended | {"cause": "sandbox_failed", "detail": f"step {step!r}: {text}"}

    def _watch_instead(self, fd: int) -> None:
        if self.pidfd not in {fd, -1}:
            self.spent.append(self.pidfd)
        self.pidfd = fd

    def drop(self, fd: int) -> None:
        """It is watched no more."""
        if fd != self._holder_fd:
            os.close(fd)

    def _look(self) -> None:
        """At the self-test's cgroups, once it runs; then it may go on."""
        shared = self._shared
        pid = _read(f"{self._bundle}/pid")
        if shared.found is not None or not pid.strip().isdigit():
            return
        shared.found = observe(shared.tree, self.cgroup, int(pid), self._wanted)
        with open(f"{self._bundle}/work/go", "w", encoding="utf-8"):
            pass

    def close(self) -> None:
        """Close every descriptor; the runtime's record goes in the background."""
        for fd in {*self.spent, self._holder_fd} - {-1, self.pidfd}:
            os.close(fd)
        self.spent.clear()
        self._holder_fd = -1
        if self._bundle and os.path.isdir(self._bundle):
            self._removal.begin(self._shared, self._name)
        super().close()


def _unmount(path: str) -> None:
    try:
        kernel.umount(path)
    except OSError:
        return  # the launch failed before it was mounted


def _copy(source: int, target: int, size_bytes: int) -> None:
    left = size_bytes
    while left > 0:
        count = os.sendfile(target, source, None, left)
        if count == 0:
            raise OSError(errno.EIO, "fewer bytes of inputs than promised")
        left -= count


def _make_folders(base: str, path: str, ids: tuple[int, int]) -> None:
    at = base
    for name in filter(None, path.split("/")):
        at = f"{at}/{name}"
        try:
            os.mkdir(at, 0o755)
        except FileExistsError:
            continue
        os.chown(at, *ids)


def _spawn_in(
    cgroup_fd: int | None, join_fds: list[int], command: list[str], stdio: list[int]
) -> int:
    """As ``_spawn``, in cgroups of the job: on a hybrid host in its v2 cgroup, which runc knows
    nothing of, and which counts its CPU time and kills it as a whole; with ``join_fds`` in all."""
    if cgroup_fd is None and not join_fds:
        return _spawn(command, stdio)
    pid = kernel.clone3(0, None, cgroup_fd)
    if pid == 0:
        try:
            os.setsid()
            for fd in join_fds:
                os.write(fd, b"0")
            high = [os.dup(fd) if fd < _STDIO_COUNT else fd for fd in stdio]
            for target, fd in enumerate(high):
                os.dup2(fd, target, inheritable=True)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(command[0], command, _ENVIRONMENT)
        finally:
            os._exit(127)
    return pid


def _spawn(command: list[str], stdio: list[int]) -> int:
    """A runtime as our child, with nothing of ours but these three descriptors."""
    moves = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio)]
    return os.posix_spawn(
        command[0],
        command,
        _ENVIRONMENT,
        file_actions=moves,
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM),
    )


def _send(pidfd: int, number: int) -> None:
    try:
        kernel.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return  # it ended by itself meanwhile


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_LOG_BYTES_MAX).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _device(path: str) -> config.Device:
    major, minor = devices.numbers(path)
    return config.Device(path=path, major=major, minor=minor)
