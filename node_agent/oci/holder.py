"""The init of a job's pid namespace where an OCI runtime runs the job.

A runtime makes its container's first process the init of the namespace. Programs are not made for
that: signals without a handler are ignored there, and orphans are nobody's. So we hold the
namespace with an init of our own, as the native launcher does, and the runtime joins it by path.
Killing this process kills everything in the namespace (pid_namespaces(7)), on every kind of cgroup.
"""

from __future__ import annotations

import os
import signal
from _socket import MSG_DONTWAIT, socket

from node_agent.launcher import kernel
from node_agent.launcher.child import Shared


def run(shared: Shared, ids: tuple[int, int], control: socket, empty: str) -> None:
    """Body of pid 1. Never returns: this is a copy of the launcher, without its privileges."""
    try:
        _drop(shared, ids, control, empty)
        _reap()
    finally:
        os._exit(1)


def _drop(shared: Shared, ids: tuple[int, int], control: socket, empty: str) -> None:
    """Nothing is left to find through /proc/1: no file, no privilege, no look into its memory."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    kernel.close_all_but((control.fileno(),))
    os.chroot(empty)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(ids[1], ids[1], ids[1])
    kernel.bounding_set_drop(shared.last_cap)
    os.setresuid(ids[0], ids[0], ids[0])
    kernel.capset(0)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    # After the change of uid, which clears it (prctl(2)); then see that the launcher lives.
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if control.recv(1, MSG_DONTWAIT) == b"":
            os._exit(1)
    except BlockingIOError:
        pass  # nothing to read, but still connected
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.seccomp_install(shared.seccomp)


def _reap() -> None:
    """Orphans of the job are ours; SIGTERM is passed on to all of it."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pid = 0  # none at the moment
        if pid == 0 and signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) == signal.SIGTERM:
            try:
                os.kill(-1, signal.SIGTERM)
            except (ProcessLookupError, PermissionError):
                continue  # nobody there, or the runtime is still setting the job up
