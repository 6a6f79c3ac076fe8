"""Hints that a coordinator's process is gone: a TCP connection to each peer, and its end.

A process that dies tells the kernel: end-of-file arrives 1–4 ms after SIGKILL (facts/control.md).
It says nothing of a paused process or a partition, and it decides nothing: it only lets the
election start a pre-vote at once (`PeerGone`). Nothing is ever read from or written to it.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from idl.errors import ConfigError, PlatformFaultError
from idl.members import CoordinatorPeer

RECONNECT_S: Final = 0.2
"""How soon a hint connection is made again; only the *end* of one that stood is a hint."""
CONNECT_TIMEOUT_S: Final = 2.0
KEEP_ALIVE: Final = (
    (socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3),
)  # fmt: skip
"""Seconds of silence, seconds between questions, questions without an answer (tcp(7))."""

log = logging.getLogger(__name__)


def require_alone(own: CoordinatorPeer) -> None:
    """Raises ConfigError where the member's UDP port is taken: it runs already, as a rule.

    Looked at before anything is started; DDS would say it with a riddle a second later.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((own.address, own.dds_port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # a name, or no address of this machine: DDS will tell
            raise ConfigError(
                f"coordinator {own.name} runs already, or another program has its UDP port "
                f"{own.address}:{own.dds_port}; stop that one, or give each a name of its own"
            ) from error


class _Accepted(asyncio.Protocol):
    """A peer's connection to us: nothing is said on it, its end is what the peer waits for.

    A protocol and not a stream: a stream's task would be cancelled at shutdown, and asyncio prints
    a traceback for that.
    """

    def __init__(self, open_ones: set[asyncio.BaseTransport]) -> None:
        self._open = open_ones
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps it, so that it can be closed with the rest."""
        self._transport = transport
        self._open.add(transport)
        _keep_alive(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer's process ended, or ours closes."""
        if self._transport is not None:
            self._open.discard(self._transport)


class Hints:
    """Connections of one coordinator to all others (`hint_port` 0: none)."""

    def __init__(
        self, own: CoordinatorPeer, peers: tuple[CoordinatorPeer, ...], gone: Callable[[str], None]
    ) -> None:
        self._own = own
        self._gone = gone
        self._accepted: set[asyncio.BaseTransport] = set()
        self._watching: dict[CoordinatorPeer, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.follow(peers)

    def follow(self, peers: tuple[CoordinatorPeer, ...]) -> None:
        """From now on these are the members: connections to others are closed without a hint."""
        self._peers = {p for p in peers if p.name != self._own.name and p.hint_port}
        self._changed.set()

    async def run(self) -> None:
        """Listens and connects until cancelled. Raises PlatformFaultError: the port is taken."""
        if not self._own.hint_port:
            return
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                lambda: _Accepted(self._accepted), self._own.address, self._own.hint_port
            )
        except OSError as error:
            raise PlatformFaultError(
                f"hint port {self._own.address}:{self._own.hint_port} cannot be opened "
                f"({error.strerror}); choose another in the cluster file"
            ) from error
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    self._changed.clear()
                    self._watch_members(group)
                    await self._changed.wait()
            finally:
                server.close()
                for transport in list(self._accepted):
                    transport.close()

    def _watch_members(self, group: asyncio.TaskGroup) -> None:
        for peer in self._watching.keys() - self._peers:
            self._watching.pop(peer).cancel()
        for peer in self._peers - self._watching.keys():
            self._watching[peer] = group.create_task(self._watch(peer))

    async def _watch(self, peer: CoordinatorPeer) -> None:
        while True:
            with suppress(OSError, TimeoutError, UnicodeError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(peer.address, peer.hint_port)
                _keep_alive(writer.transport)
                try:
                    await _until_end(reader)
                finally:
                    writer.close()
                log.info("hint connection ended", extra={"peer": peer.name})
                self._gone(peer.name)
            await asyncio.sleep(RECONNECT_S)


def _keep_alive(transport: asyncio.BaseTransport) -> None:
    """A peer that lost its power says nothing: the kernel asks, else we would hold a connection to
    nobody for ever, and the next end of that peer would be no hint."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def _until_end(reader: asyncio.StreamReader) -> None:
    """Returns at end-of-file or reset; what arrives is thrown away, a peer sends nothing."""
    with suppress(ConnectionError):
        while await reader.read(64):
            pass
