"""Server processes that outlive their starter: spawn, recognise again, stop.

A process is recognised by pid *and* start time (field 22 of /proc/PID/stat, proc(5)), so that a
reused pid is never signalled.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from idl.errors import PlatformFaultError

POLL_S: Final = 0.02
RECORD_NAME: Final = "broker.json"
STOP_GRACE_S: Final = 10.0
"""A KRaft node needs 2–6 s to leave a clean log; after this it is killed."""
NICE: Final = -10
"""Every decision waits for the broker: it goes before the jobs of its machine, where we may."""
_ENV_KEPT: Final = ("PATH", "HOME", "LANG", "TZ", "JAVA_HOME", "TMPDIR")
"""Brokers read settings from variables of their own; ours must not reach them by accident."""


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process for good: `started_ticks` is its start time in clock ticks since boot."""

    pid: int
    started_ticks: int


class BrokerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`broker.json`: what is needed to find and stop a broker that another process started."""

    kind: str
    bootstrap: str
    ports: tuple[int, ...] = ()
    processes: tuple[ProcessIdentity, ...] = ()


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this pid now; None where there is none, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a process calls itself what it likes
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else ProcessIdentity(pid, int(fields[19]))


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether this very process still runs."""
    return identify(identity.pid) == identity


def spawn(argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> ProcessIdentity:
    """Starts `argv` in a session of its own; output is appended to `log`. It outlives us.

    Raises PlatformFaultError where it cannot be executed.
    """
    kept = {name: os.environ[name] for name in _ENV_KEPT if name in os.environ}
    try:
        with log.open("ab") as output:
            child = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=kept | dict(env or {}),
                start_new_session=True,
            )
    except OSError as error:
        raise PlatformFaultError(f"cannot start {argv[0]}: {error.strerror}") from error
    _children[child.pid] = child
    with contextlib.suppress(PermissionError, ProcessLookupError):  # only root may; it may be gone
        os.setpriority(os.PRIO_PGRP, child.pid, NICE)
    found = identify(child.pid)
    if found is None:
        raise PlatformFaultError(
            f"{Path(argv[0]).name} ended while starting: {log_tail(log)}; the whole log is {log}"
        )
    return found


_children: dict[int, "subprocess.Popen[bytes]"] = {}
"""Our own children must be reaped by us; those of another starter are reaped by init."""


def reap() -> None:
    """Collects the exit status of our children that ended, so that none stays a zombie."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            del _children[pid]


def send(identity: ProcessIdentity, number: signal.Signals) -> None:
    """Signals this very process, if it still runs."""
    if is_alive(identity):
        try:
            os.kill(identity.pid, number)
        except ProcessLookupError:
            return


def wait_gone(identities: Sequence[ProcessIdentity], timeout_s: float) -> bool:
    """Waits until none of them runs; False on timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        reap()
        if not any(is_alive(i) for i in identities):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)


def stop(identities: Sequence[ProcessIdentity], grace_s: float = STOP_GRACE_S) -> None:
    """SIGTERM to all, wait, SIGKILL to those left, wait. Raises PlatformFaultError if one stays."""
    for identity in identities:
        send(identity, signal.SIGTERM)
    if wait_gone(identities, grace_s):
        return
    for identity in identities:
        send(identity, signal.SIGKILL)
    if not wait_gone(identities, grace_s):
        left = ", ".join(str(i.pid) for i in identities if is_alive(i))
        raise PlatformFaultError(f"broker process {left} does not end even by SIGKILL")


def free_port(preferred: int = 0) -> int:
    """A TCP port of the loopback that nobody listens on: `preferred` if it is one of them."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise PlatformFaultError("no TCP port is free on the loopback; close some programs")


def write_record(directory: Path, record: BrokerRecord) -> None:
    """Replaces `broker.json` atomically."""
    path = directory / RECORD_NAME
    draft = path.with_suffix(".tmp")
    draft.write_bytes(msgspec.json.encode(record))
    draft.replace(path)


def read_record(directory: Path) -> BrokerRecord | None:
    """`broker.json`, or None. Raises PlatformFaultError where it is not ours to read."""
    try:
        data = (directory / RECORD_NAME).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlatformFaultError(
            f"cannot read {directory / RECORD_NAME}: {error.strerror}"
        ) from error
    try:
        return msgspec.json.decode(data, type=BrokerRecord)
    except msgspec.MsgspecError as error:
        raise PlatformFaultError(
            f"{directory / RECORD_NAME} is damaged ({error}); stop the broker by hand, delete it"
        ) from error


def log_tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, for the one line that says why a start failed."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return "no log"
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:])[:300]
