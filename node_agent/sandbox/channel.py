"""The way to the launcher: spawn one or call the one that is there, one SOCK_SEQPACKET socket.

The first agent gets one end of a socketpair. With a home the launcher also listens on a named
socket there (mode 0600, in a directory of ours alone; both ends check SO_PEERCRED), on which the
agent's next process calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from node_agent.sandbox.plan import CommandRefused, SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings

# One record of the launcher's protocol (node_agent.launcher.doors.MESSAGE_BYTES_MAX).
MESSAGE_BYTES_MAX = 1 << 18
SOCKET_NAME = "launcher.sock"
LOG_NAME = "launcher.log"
# A launcher that lives answers a call at once: the kernel does, from its backlog.
_CALL_TIMEOUT_S = 5.0
_FDS_MAX = 2
_STDERR_TAIL_BYTES = 4096
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from node_agent.{}.main import main; sys.exit(main(int(sys.argv[2]), int(sys.argv[3])))"
)
_CODE_ROOT = str(Path(__file__).resolve().parents[2])
# By this variable `outrider down` finds what belongs to a local cluster: also an orphaned launcher.
_ENV_KEPT = ("OUTRIDER_LOCAL_PROCESS",)

# Symbols bound at once are bound once, not again in every fork of the OCI launcher.
_ENV = {"LC_ALL": "C.UTF-8", "LD_BIND_NOW": "1"}

Receive = Callable[[bytes, list[int]], None]


class Channel:
    """One connection: JSON records with descriptors beside them."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._lock = asyncio.Lock()
        self._receive: Receive | None = None

    def listen(self, receive: Receive) -> None:
        """Calls `receive` for every record; empty bytes once the launcher is gone."""
        self._receive = receive
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._on_readable)

    def deaf(self) -> None:
        """Hears nothing any more."""
        if self._receive is not None:
            self._receive = None
            asyncio.get_running_loop().remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Leaves; the launcher reads it as end of file."""
        self.deaf()
        self._socket.close()

    def _on_readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, _FDS_MAX)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if self._receive is not None:
            self._receive(data, fds)

    async def send(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        """One record. Raises CommandRefused (too large) or SandboxUnavailable (nobody there)."""
        try:
            data = msgspec.json.encode(message)
        except UnicodeEncodeError as error:
            raise CommandRefused(f"argv and env must be valid UTF-8: {error}") from error
        if len(data) > MESSAGE_BYTES_MAX:
            raise CommandRefused(f"the plan takes {len(data)} bytes, at most {MESSAGE_BYTES_MAX}")
        async with self._lock:
            while True:
                try:
                    socket.send_fds(self._socket, [data], list(fds))
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    if error.errno == errno.EMSGSIZE:
                        raise CommandRefused(
                            f"the plan takes {len(data)} bytes: too many"
                        ) from error
                    raise SandboxUnavailable(f"the launcher is gone: {error}") from error
                else:
                    return

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self._socket.fileno(), _wake, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self._socket.fileno())


class LauncherProcess:
    """The launcher as a process: our child, or one that an earlier agent process started."""

    def __init__(self, pid: int, log_fd: int, child: asyncio.subprocess.Process | None) -> None:
        """Takes `log_fd`, a descriptor of the launcher's standard error, or -1."""
        self.pid = pid
        self._log_fd, self._child = log_fd, child
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1

    async def gone(self, timeout_s: float) -> None:
        """Returns once it has ended; it is killed after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended()
        except TimeoutError:
            self.kill()
            await self._ended()

    async def _ended(self) -> None:
        if self._child is not None:
            await self._child.wait()
            return
        if self._pidfd < 0:
            return
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(self._pidfd, _wake, ready)
        try:
            await ready
        finally:
            loop.remove_reader(self._pidfd)

    def kill(self) -> None:
        """SIGKILL; its jobs die with it."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def stderr_tail(self) -> str:
        """Its last words."""
        if self._log_fd < 0:
            return ""
        size = os.fstat(self._log_fd).st_size
        data = os.pread(self._log_fd, _STDERR_TAIL_BYTES, max(0, size - _STDERR_TAIL_BYTES))
        return data.decode("utf-8", "replace")

    def close(self) -> None:
        """Closes our descriptors of it. Idempotent."""
        for fd in (self._pidfd, self._log_fd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._log_fd = -1


async def spawn(settings: SandboxSettings, home: Path | None) -> tuple[Channel, LauncherProcess]:
    """A new launcher. Raises OSError."""
    program = "launcher" if settings.backend == "native" else "oci"
    python = settings.python or getattr(sys, "_base_executable", sys.executable)
    kept = {name: os.environ[name] for name in _ENV_KEPT if name in os.environ}
    with contextlib.ExitStack() as ours:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.enter_context(theirs)
        listener = ours.enter_context(_named_socket(home)) if home is not None else None
        log_fd = _open_log(home)
        fds = [theirs.fileno(), *([listener.fileno()] if listener is not None else [])]
        try:
            child = await asyncio.create_subprocess_exec(
                python,
                *("-I", "-S", "-c", _BOOT.format(program), _CODE_ROOT),
                *(str(fds[0]), str(fds[1]) if listener is not None else "-1"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log_fd,
                pass_fds=fds,
                env={**_ENV, "OUTRIDER_INSTANCE": settings.instance, **kept},
                start_new_session=True,
            )
        except BaseException:
            mine.close()
            os.close(log_fd)
            raise
    return Channel(mine), LauncherProcess(child.pid, log_fd, child)


def call(home: Path) -> tuple[Channel, LauncherProcess] | None:
    """The launcher that listens in `home`; None where there is none, or a stranger's."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_CALL_TIMEOUT_S)
    try:
        with _short_name(home) as name:
            connection.connect(name)
        size = struct.calcsize("3i")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        connection.close()
        return None  # never there, or gone: the name outlives its listener
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        connection.close()
        return None
    log = home / LOG_NAME
    log_fd = os.open(log, os.O_RDONLY | os.O_CLOEXEC) if log.exists() else -1
    return Channel(connection), LauncherProcess(pid, log_fd, None)


def _named_socket(home: Path) -> socket.socket:
    """Bound, not yet listening: until the launcher does, callers are refused."""
    (home / SOCKET_NAME).unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.fchmod(bound.fileno(), 0o600)  # before it has a name: Linux makes the file with it
        with _short_name(home) as name:
            bound.bind(name)
    except BaseException:
        bound.close()
        raise
    return bound


@contextlib.contextmanager
def _short_name(home: Path) -> Iterator[str]:
    """The socket's name by way of a descriptor: sun_path holds 108 bytes, paths may be longer."""
    directory = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET_NAME}"
    finally:
        os.close(directory)


def _open_log(home: Path | None) -> int:
    """Where the launcher's last words go: a file, because it may outlive any reader of a pipe."""
    if home is None:
        with tempfile.TemporaryFile() as nameless:
            return os.dup(nameless.fileno())
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    return os.open(home / LOG_NAME, flags, 0o600)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
