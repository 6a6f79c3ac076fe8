"""Detached processes: start one, recognise it later, stop it without ever hitting a stranger.

A pid is reused by the kernel, a pid with its start time is not: `Identity` holds both (proc(5),
field 22 of `stat`), and signals go through a pidfd opened before the identity is checked
(pidfd_open(2)), so that what was checked is what is signalled. Linux only.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

import outrider

MARK_VARIABLE: Final = "OUTRIDER_LOCAL_PROCESS"
"""Environment variable by which `down` finds a process that `up` started but did not record."""
STOP_GRACE_S: Final = 10.0
"""SIGTERM to SIGKILL: an agent ends its jobs (0.5 s grace each) and Apache Kafka needs 2–6 s."""
KILL_WAIT_S: Final = 5.0
"""After SIGKILL only a process stuck in the kernel is still there."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """One process, for ever: its pid and its start time in clock ticks since boot."""

    pid: int
    start_ticks: int


def identity_of(pid: int) -> Identity | None:
    """The process that has `pid` now, or None where there is none (or it is a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a process calls itself what it likes
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return Identity(pid=pid, start_ticks=int(fields[19]))


def is_alive(identity: Identity) -> bool:
    """True while that very process runs."""
    return identity_of(identity.pid) == identity


def _open(identity: Identity) -> int | None:
    """A pidfd of that very process, or None where it is gone."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    if is_alive(identity):
        return pidfd
    os.close(pidfd)
    return None


def send_signal(identity: Identity, number: signal.Signals) -> bool:
    """Signals that very process; False where it is gone."""
    pidfd = _open(identity)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def wait_gone(identity: Identity, timeout_s: float) -> bool:
    """True once that very process has ended; False after `timeout_s`."""
    pidfd = _open(identity)
    if pidfd is None:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def stop_all(identities: Sequence[Identity], grace_s: float = STOP_GRACE_S) -> list[Identity]:
    """SIGTERM to all, then SIGKILL to those that outlive `grace_s`; these are returned.

    SIGCONT follows SIGTERM: a process paused by a fault test would never see it.
    """
    for identity in identities:
        send_signal(identity, signal.SIGTERM)
        send_signal(identity, signal.SIGCONT)
    deadline = time.monotonic() + grace_s
    stubborn = [
        identity
        for identity in identities
        if not wait_gone(identity, max(0.0, deadline - time.monotonic()))
    ]
    for identity in stubborn:
        send_signal(identity, signal.SIGKILL)
    for identity in stubborn:
        wait_gone(identity, KILL_WAIT_S)
    return stubborn


def spawn(
    arguments: Sequence[str], log: Path, mark: str, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Starts a process in a session of its own, its output appended to `log`.

    Our packages are importable in it even where they are not installed.
    """
    root = str(Path(outrider.__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, **env, "PYTHONPATH": path, MARK_VARIABLE: mark}
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            env=environment,
            start_new_session=True,
        )


def python_module(module: str, *arguments: str) -> list[str]:
    """argv that runs a module of ours with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def find_marked(prefix: str) -> list[Identity]:
    """Processes of this user that `spawn` started with a mark like this, and their children."""
    wanted = f"{MARK_VARIABLE}={prefix}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        identity = identity_of(int(folder.name))
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or already gone
            continue
        if identity is not None and any(text.startswith(wanted) for text in variables):
            found.append(identity)
    return found


def log_tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, or what hinders reading it."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(cannot read {log}: {error.strerror})"
    return "\n".join(text.splitlines()[-lines:]) or f"({log} is empty)"
