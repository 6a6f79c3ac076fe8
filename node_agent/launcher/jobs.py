"""One running job as the launcher sees it: start, stop, and a verdict on how it ended.

The first reason to end wins (asked to stop, out of time, out of memory); what init reports counts
only when nobody had a reason. Everything init says is data from inside the sandbox: it decides the
job's own outcome and nothing else.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from _socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    socket,
    socketpair,
)

from node_agent.launcher import board, command, kernel, rights, usage, zygote
from node_agent.launcher.cgroups import JobCgroup, Remains, Tree
from node_agent.launcher.child import RESULT_NAME, JobSpec, Shape, Shared
from node_agent.launcher.limits import Limits
from node_agent.launcher.looks import NO_LOOKS, Looks
from node_agent.launcher.program import Fault, Program, blame
from node_agent.launcher.signals import signal

# After SIGKILL the kernel needs only to unwind; a job that is still there after this is stuck in
# the kernel (uninterruptible I/O) and is reported, not waited for in silence.
KILL_AGAIN_S = 2.0
# A lease counts time in which the host was suspended, poll timeouts do not: this is how much longer
# than its lease a job may run after the host woke.
LEASE_LOOK_S = 1.0
LEASE_OVER = "lease ran out: it was not renewed, and the launcher ended the job"
_OOM_LOOK_S = 0.005
_OOM_LOOKS_MAX = 40


class Job:
    """One sandbox from clone3 to the removal of its cgroups; a job once ``assign`` gave it one."""

    def __init__(self, shape: Shape, slot: int, cgroup: JobCgroup) -> None:
        """Raises OSError; nothing but the cgroup is left then."""
        self.shape, self.slot, self.cgroup = shape, slot, cgroup
        self.pid = self.pidfd = -1
        # Opened ahead of the fork: whatever the launcher does between two forks costs it a page
        # fault for every page that it writes to.
        self._join_fds = cgroup.join_fds()
        try:
            ours, self._theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)
        except OSError:
            self._close_join_fds()
            raise
        self.control: socket | None = ours
        self.work_fd = -1
        self.ready = False  # init has given up everything and waits for its command
        self.key = ""
        self._lists: list[Program] = []  # what init runs: to be asked whom to blame
        self._tried: tuple[str, list[str]] = ("", [])
        self._holds: frozenset[str] = frozenset()
        self._spec: JobSpec | None = None
        self._stdio: list[int] = []
        self.wall_ms = self.grace_ms = self.result_bytes_max = 0
        self.started_at = self.deadline_at = float("inf")
        self.cpu_ms = 0
        self.collects = False  # its work directory is wanted when it has ended
        self.looks = NO_LOOKS
        self.kill_at: float | None = None
        self.lease_until_ms = 0  # CLOCK_BOOTTIME; 0: runs without a lease, or it is over
        self.oom_look_at: float | None = None
        self._oom_looks_left = 0
        self.ended_by = ""  # timed_out, killed, out_of_memory: why we ended it
        self.why = ""
        self.status: int | None = None  # wait status of the job itself, as init saw it
        self.failure: tuple[str, int, str] | None = None  # step, errno, text
        self.not_executed: tuple[int, str] | None = None  # exit code, text
        self.started = False
        self.ended_at = 0.0
        self.usage_cpu_us = self.usage_rss_bytes = 0

    @property
    def remains(self) -> Remains:
        """To be removed after its end."""
        return self.cgroup

    # --- starting -----------------------------------------------------------------------------
    def launch(self, shared: Shared, ids: tuple[int, int]) -> None:
        """Fork init into its namespaces and cgroups. Raises OSError; nothing runs then."""
        self._holds = shared.holds
        assert shared.inits is not None, "of the native launcher"
        try:
            self.pid, self.pidfd, first = shared.inits.start(
                self.shape, ids, self._theirs.fileno(), self._join_fds, self.cgroup.into_fd
            )
            self._lists.append(first)
        finally:
            self._theirs.close()
            self._close_join_fds()

    def _close_join_fds(self) -> None:
        for fd in self._join_fds:
            os.close(fd)
        self._join_fds = []

    def assign(self, spec: JobSpec, stdio: list[int], disks: list[str]) -> None:
        """Give the sandbox its job; it starts as soon as init is ready. Takes ``stdio``, unless a
        limit cannot be written: then it raises OSError and nothing may run here."""
        self.cgroup.limit(_limits(spec), disks)
        self.key, self._spec, self._stdio = spec.key, spec, stdio
        self.wall_ms, self.grace_ms = spec.wall_ms, spec.grace_ms
        self.result_bytes_max, self.lease_until_ms = spec.result_bytes_max, spec.lease_until_ms
        self.started_at = time.monotonic()
        self.deadline_at = self.started_at + spec.wall_ms / 1000
        self.cpu_ms, self.collects = spec.cpu_ms, spec.collects
        at_once = self.cgroup.cpus_at_once(spec.cpu_millis)
        self.looks = Looks(spec.cpu_ms, spec.idle_ms, at_once, self.started_at)
        if self.ready:
            self._go()

    def _go(self) -> None:
        """The CPU quota begins here, so that the job does not pay for its sandbox."""
        spec, stdio = self._spec, self._stdio
        if spec is None or self.control is None:
            return
        self._spec, self._stdio = None, []  # a command may hold secrets: later inits are copies
        try:
            self._tried = (spec.argv[0], command.candidates_of(spec))
            first = self._lists[0]
            second, content = command.job_list(zygote.BOARD, spec, self._holds, first)
            self._lists.append(second)
            self.cgroup.limit_cpu(spec.cpu_millis)
            self.control.sendmsg([content], rights.beside(stdio))
        except OSError as error:
            if error.errno in {errno.E2BIG, errno.EMSGSIZE}:  # whoever runs it, as execve(2) says
                self._end_by(Fault("exec", error.strerror or "", errno.E2BIG))
            else:
                self.failure = ("command", error.errno or 0, str(error))
            self._signal(signal.SIGKILL)
        finally:
            for fd in stdio:
                os.close(fd)

    # --- events -------------------------------------------------------------------------------
    def on_control(self) -> str:
        """Read one message of init: ``started``, ``ended``, ``report``, ``empty`` or ``closed``."""
        if self.control is None:
            return "closed"
        space, flags = rights.room(1), MSG_CMSG_CLOEXEC | MSG_DONTWAIT
        try:
            data, ancillary, how, _ = self.control.recvmsg(board.MESSAGE_BYTES_MAX, space, flags)
        except BlockingIOError:
            return "empty"
        except ConnectionResetError:
            return "closed"
        for fd in rights.taken(ancillary):
            self._take_work_fd(fd)
        if how & MSG_CTRUNC and self.work_fd < 0:
            self.failure = ("work directory", errno.EMFILE, "no descriptor is left for it")
            self._signal(signal.SIGKILL)  # its result would not be found
            return "report"
        if data[:1] == board.STARTED:
            self.started = True
            self._lists.clear()
            return "started"
        self._on_report(data)
        if data[:1] == board.ENDED:
            return "ended"
        return "report" if data else "closed"

    def _take_work_fd(self, fd: int) -> None:
        if self.work_fd >= 0:  # only set-up code sends one, once
            os.close(fd)
            return
        self.work_fd = fd

    def _on_report(self, data: bytes) -> None:
        kind, rest = data[:1], data[8:]
        words = [
            int.from_bytes(rest[at : at + 8], "little", signed=True)
            for at in range(0, len(rest), 8)
        ]
        if kind == board.READY:
            self.ready = True
            self._go()
        elif kind == board.ENDED and len(words) == board.ENDED_WORDS - 1:
            self.status, *times, rss_kib = words
            self.ended_at = time.monotonic()
            user_s, user_us, system_s, system_us = times
            self.usage_cpu_us = (user_s + system_s) * 1_000_000 + user_us + system_us
            self.usage_rss_bytes = rss_kib * 1024
        elif kind == board.FAILED and len(words) == 2 and self._lists:
            self._end_by(blame(self._lists, *words))
        elif kind == board.NOT_EXECUTED:
            self._end_by(command.why_not_executed(*self._tried, words))

    def _end_by(self, fault: Fault) -> None:
        code = command.exit_code_of(fault)
        if code:
            self.not_executed = (code, f"{fault.step}: {fault.text}")
        else:
            self.failure = (fault.step, fault.errno, fault.text)

    def on_oom(self, now: float) -> None:
        """v1's OOM eventfd fired: the job dies as a group, as memory.oom.group does on v2.

        The event comes just before the kill is counted (and sometimes memory is found after all),
        so the counter is looked at again for a while.
        """
        os.eventfd_read(self.cgroup.oom_event_fd)
        self._oom_looks_left = _OOM_LOOKS_MAX
        self._look_for_oom(now)

    def _look_for_oom(self, now: float) -> None:
        if self.ended_by:
            self.oom_look_at = None
        elif self.cgroup.oom_kills():
            self.oom_look_at = None
            self.ended_by, self.why = "out_of_memory", "memory limit reached"
            self.kill_now()
        elif self._oom_looks_left > 0:
            self._oom_looks_left -= 1
            self.oom_look_at = now + _OOM_LOOK_S
        else:
            self.oom_look_at = None

    def on_time(self, now: float) -> None:
        """Deadlines: the lease, which has no grace, then the wall time, then the grace."""
        if self.lease_until_ms and kernel.boot_ms() >= self.lease_until_ms:
            self.lease_until_ms = 0
            self.ended_by, self.why = self.ended_by or "lease_over", self.why or LEASE_OVER
            self.kill_at = now
        if self.oom_look_at is not None and now >= self.oom_look_at:
            self._look_for_oom(now)
        if not self.ended_by and now >= self.deadline_at:
            self.stop("timed_out", f"ran longer than {self.wall_ms} ms", now)
        if not self.ended_by and now >= self.looks.at:
            why = self.looks.look(now, self._cpu_us())
            if why:
                self.stop("timed_out", why, now)
        if self.kill_at is not None and now >= self.kill_at:
            self.kill_now()
            self.kill_at = now + KILL_AGAIN_S

    def _cpu_us(self) -> int:
        counted = self.cgroup.cpu_us()
        return usage.of_tree(self.pid) if counted is None else counted

    def next_deadline(self) -> float:
        """When ``on_time`` has something to do next."""
        due = self.kill_at
        if due is None:
            due = min(self.deadline_at, self.looks.at)
        if self.lease_until_ms:
            left_s = (self.lease_until_ms - kernel.boot_ms()) / 1000
            due = min(due, time.monotonic() + min(left_s, LEASE_LOOK_S)) if left_s > 0 else 0.0
        return due if self.oom_look_at is None else min(due, self.oom_look_at)

    def extend(self, until_ms: int) -> None:
        """The lease was renewed; one that is over stays over, whoever is late."""
        if kernel.boot_ms() < self.lease_until_ms:
            self.lease_until_ms = max(self.lease_until_ms, until_ms)

    # --- stopping -----------------------------------------------------------------------------
    def stop(self, cause: str, why: str, now: float) -> None:
        """SIGTERM to everything in the job, SIGKILL after the grace."""
        if self.ended_by:
            return
        self.ended_by, self.why = cause, why
        self.kill_at = now + self.grace_ms / 1000
        self._signal(signal.SIGTERM)

    def kill_now(self) -> None:
        """SIGKILL to init, and thereby to its whole pid namespace; then to the cgroup."""
        self.kill_init()
        self.cgroup.kill()

    def kill_init(self) -> None:
        """SIGKILL to init alone; the kernel does the rest when it ends."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            kernel.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return  # it ended by itself meanwhile

    # --- the end ------------------------------------------------------------------------------
    def reap(self) -> int | None:
        """Wait status of init once it is dead; None while it lives.

        Waits on the process itself: a stopped or traced child is not a dead one.
        """
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if pid == 0 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            return None
        self.ended_at = time.monotonic()
        # Fallbacks where no cgroup counts: all descendants that were waited for, and the largest.
        self.usage_cpu_us = int((used.ru_utime + used.ru_stime) * 1_000_000)
        self.usage_rss_bytes = used.ru_maxrss * 1024
        while self.on_control() in {"started", "ended", "report"}:
            continue  # a short job's last words may still be in the socket
        return status

    def outcome(self, init_status: int) -> dict[str, object]:
        """The verdict, as the message for the agent."""
        result = self.cgroup.used()
        cpu_us = result.pop("cpu_us", None)
        result.setdefault("memory_peak_bytes", self.usage_rss_bytes)
        result["wall_ms"] = int((self.ended_at - self.started_at) * 1000)
        result["cpu_ms"] = (cpu_us if isinstance(cpu_us, int) else self.usage_cpu_us) // 1000
        result.update(self._verdict(init_status))
        return result

    def _verdict(self, init_status: int) -> dict[str, object]:
        exit_code, number = _decode(self.status)
        ended = {"exit_code": exit_code, "signal": number}
        if self.cgroup.oom_kills() and self.ended_by in {"", "out_of_memory"}:
            return {"cause": "out_of_memory", "detail": "memory limit reached", **ended}
        if self.ended_by:
            return {"cause": self.ended_by, "detail": self.why, **ended}
        if self.failure is not None:
            step, error, text = self.failure
            name = errno.errorcode.get(error, str(error))
            return {"cause": "sandbox_failed", "detail": f"step {step!r}, {name}: {text}"}
        if self.not_executed is not None:
            code, text = self.not_executed
            return {"cause": "exited", "exit_code": code, "detail": text}
        if self.status is None:
            return {"cause": "sandbox_failed", "detail": f"init ended with status {init_status}"}
        if number == signal.SIGXCPU and self.cpu_ms:
            why = f"cpu: a process used more than {self.cpu_ms} ms of CPU time"
            return {"cause": "timed_out", "detail": why, **ended}
        return {"cause": "signalled" if number is not None else "exited", "detail": "", **ended}

    def open_result(self) -> tuple[int, str]:
        """(descriptor of the result file or -1, why it was refused).

        All processes are dead, so nothing can swap the file under us; symlinks, magic links and
        ways out of /work are refused by the kernel, and O_NONBLOCK keeps a FIFO from hanging us.
        Raises OSError where that says nothing about the file.
        """
        if self.work_fd < 0:
            return -1, ""
        resolve = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            fd = kernel.openat2(self.work_fd, RESULT_NAME, flags, resolve)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return -1, ""
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise
            return -1, f"result cannot be opened: {os.strerror(error.errno or 0)}"
        facts = os.fstat(fd)
        refused = ""
        if not stat.S_ISREG(facts.st_mode):
            refused = "result is not a regular file"
        elif facts.st_size > self.result_bytes_max:
            refused = f"result has {facts.st_size} bytes, at most {self.result_bytes_max}"
        if refused:
            os.close(fd)
            return -1, refused
        return fd, ""

    def close(self) -> None:
        """Close every descriptor; the cgroup directories are removed separately."""
        for fd in (self.pidfd, self.work_fd, *self._stdio):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.work_fd = -1
        self._stdio = []
        self._close_join_fds()
        if self.control is not None:
            self.control.close()
            self.control = None
        self.cgroup.close_watch()


def make(tree: Tree, name: str, shape: Shape, slot: int) -> Job:
    """A sandbox that is still to be launched, in cgroups of its own that hold init alone; on
    failure nothing is left behind."""
    wanted = Limits(0, 0, 0, shape.io, shape.cpus, shape.mems)
    cgroup = tree.make(name, wanted.on_demand)
    try:
        cgroup.hold()
        tree.grant_devices(cgroup, shape.devices)
        return Job(shape, slot, cgroup)
    except OSError:
        cgroup.close_watch()
        cgroup.remove()
        raise


def _limits(spec: JobSpec) -> Limits:
    return Limits(
        spec.memory_bytes,
        spec.pids_max + 1,  # one more than the job may have: init is in the group too
        spec.swap_bytes,
        spec.shape.io,
        spec.shape.cpus,
        spec.shape.mems,
    )


def _decode(status: int | None) -> tuple[int | None, int | None]:
    if status is None or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        return None, None
    code = os.waitstatus_to_exitcode(status)
    return (code, None) if code >= 0 else (None, -code)
