# ruff: noqa: PTH116, PTH123
# pathlib would add a third to the memory that every job's fork copies.
"""The launcher's children: those it started, those it was left, and how all of them are reaped.

A runtime starts helpers and the container itself, and goes. As their subreaper (prctl(2)) the
launcher becomes their parent; whoever of them is in a job's pid namespace keeps that namespace, and
so our init in it, from ending until *we* have waited for it (pid_namespaces(7),
``zap_pid_ns_processes``). So every child that nobody here knows is reaped as soon as it is dead,
and no status that somebody waits for is taken from him.
"""

from __future__ import annotations

import os

from node_agent.launcher import kernel
from node_agent.launcher.signals import signal

TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    from resource import struct_rusage

# One read takes as many records of signalfd_siginfo (128 bytes) as ever wait: SIGCHLD is not queued
# twice.
_SIGNAL_RECORDS = 4 * 128
_PID_BYTES_MAX = 64
CHILDREN_FILE = "/proc/thread-self/children"


class Children:
    """Every child of this process, which has one thread."""

    def __init__(self) -> None:
        """Raises OSError on a kernel that does not list children (CONFIG_PROC_CHILDREN)."""
        os.stat(CHILDREN_FILE)
        self._known: set[int] = set()
        self._starting: dict[int, str] = {}
        # Dead strangers, and the starters that may still name them: those that were at work when we
        # saw it dead. A runtime's container can be ours, and dead, before the runtime names it
        # (crun: a process in between ends early), and its status is the job's.
        self._waiting: dict[int, frozenset[int]] = {}
        # Blocked, so that it is read here; what we start is given an empty mask, or waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        self.signal_fd = kernel.signalfd(signal.SIGCHLD)  # readable: some child has ended

    def know(self, pid: int) -> int:
        """``pid`` is waited for by whoever says so, with ``wait``. Returns it."""
        self._known.add(pid)
        return pid

    def know_starter(self, pid: int, pid_file: str) -> int:
        """As ``know``; the child that it names in ``pid_file`` before it ends is known as well."""
        self._starting[pid] = pid_file
        return self.know(pid)

    def wait(self, pid: int) -> tuple[int, struct_rusage] | None:
        """Wait status and usage of a known child that is dead; None while it lives."""
        dead, status, used = os.wait4(pid, os.WNOHANG)
        if dead == 0 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            return None
        self._known.discard(pid)
        return status, used

    def wait_starter(self, pid: int) -> int | None:
        """Exit code of a starter that is dead (-n: signal n), None while it lives.

        Helpers of one that failed are killed: what they would set up is wanted no more.
        """
        seen = _dead(pid)
        if seen is None:
            return None
        if seen.si_status != 0:  # exit code or signal
            kill_group(pid)  # before it is reaped: its number is still its group's alone
        _, status = os.waitpid(pid, 0)
        self._known.discard(pid)
        return os.waitstatus_to_exitcode(status)

    def started(self, starter: int) -> tuple[int, int]:
        """(pid, pidfd) of the child that a dead starter named, known from now on.

        Raises OSError or ValueError where there is none.
        """
        pid = int(_head(self._starting[starter]))
        _dead(pid)  # no child of ours: ECHILD
        fd = os.pidfd_open(pid)
        self.know(pid)
        del self._starting[starter]
        self.reap_strangers()
        return pid, fd

    def failed(self, starter: int) -> None:
        """Whatever it started is nobody's."""
        del self._starting[starter]
        self.reap_strangers()

    def reap_strangers(self) -> None:
        """Wait for every dead child that nobody knows, nor can still come to. Never blocks."""
        self._drain()
        waiting = self._waiting
        self._waiting = {}
        for pid in _list():
            if pid in self._known or not _dead(pid):
                continue
            starters = waiting.get(pid, frozenset(self._starting)) & self._starting.keys()
            if starters:
                self._waiting[pid] = starters
            else:
                os.waitpid(pid, 0)

    def kill_all(self) -> None:
        """SIGKILL every child."""
        for pid in _list():
            os.kill(pid, signal.SIGKILL)

    def end_all(self) -> None:
        """Kill and reap every child: nothing of ours outlives the launcher. Blocks for it."""
        while left := _list():  # whatever they had started is ours next
            self.kill_all()
            for pid in left:
                os.waitpid(pid, 0)

    def _drain(self) -> None:
        try:
            os.read(self.signal_fd, _SIGNAL_RECORDS)
        except BlockingIOError:
            return  # looked at between two signals


def _list() -> list[int]:
    with open(CHILDREN_FILE, "rb") as file:
        return [int(word) for word in file.read().split()]


def _dead(pid: int) -> os.waitid_result | None:
    """How a child ended, None while it lives. It stays ours, and its number its own, until it is
    waited for. Raises ChildProcessError."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def kill_group(leader: int) -> None:
    """SIGKILL a child that was not waited for, and what it started that left neither its session
    nor its group."""
    os.kill(leader, signal.SIGKILL)
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return  # it did not come to be a leader yet


def _head(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_PID_BYTES_MAX).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
