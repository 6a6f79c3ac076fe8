"""How the outside reaches the launcher: the first agent, its successors, SIGTERM.

One SOCK_SEQPACKET record is one message; descriptors travel beside it. Nothing here blocks, so
that an agent that reads nothing for a while cannot stall the deadlines of jobs.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from _socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    SO_PEERCRED,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socket,
)

from node_agent.launcher import rights, wire

# One request record; the agent's plan check keeps commands well below it.
MESSAGE_BYTES_MAX = 1 << 18
STDIO_COUNT = 3
# Three for the job, and the read ends of its output for us; for a large payload its memory and
# the pipe to feed it into.
RUN_FDS = STDIO_COUNT + 2
FEED_FDS = 2
_RUN_FDS_MAX = RUN_FDS + FEED_FDS + 1  # and the memory with its input files
_CREDENTIALS_BYTES = 12  # struct ucred; unix(7)
# Only the agent's next process ever calls; more than one at a time is a mistake.
BACKLOG = 4
# Characters left of a detail that made its message longer than the socket takes.
_DETAIL_MAX = 1000


class Doors:
    """The agent's socket, the named one where its next process calls (it listens already), and
    SIGTERM's signalfd."""

    def __init__(self, agent: socket, listener: socket | None, stop_fd: int) -> None:
        self.agent: socket | None = agent
        self._listener = listener
        self.stop_fd = stop_fd
        self._poll: select.epoll | None = None  # none before `watch` and after `close`
        # Messages the agent has not taken yet: a few a job at most, and jobs are bounded by slots.
        # The descriptors belong to whoever queued them, until the agent says forget.
        self._outbox: list[tuple[bytes, tuple[int, ...]]] = []
        self._waits_for_room = False

    @property
    def agent_fd(self) -> int:
        """-1 while there is none."""
        return self.agent.fileno() if self.agent is not None else -1

    @property
    def listener_fd(self) -> int:
        """-1 where no next agent can come."""
        return self._listener.fileno() if self._listener is not None else -1

    def watch(self, poll: select.epoll) -> None:
        """Have whatever comes in wake this poll."""
        self._poll = poll
        for fd in (self.agent_fd, self.listener_fd, self.stop_fd):
            if fd >= 0:
                poll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        """Nobody is listened to any more; what is queued still goes out where there is room."""
        poll, self._poll = self._poll, None
        for fd in (self.agent_fd, self.listener_fd, self.stop_fd):
            if fd >= 0 and poll is not None:
                poll.unregister(fd)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # --- who talks ----------------------------------------------------------------------------
    def accept(self) -> socket | None:
        """Whoever called. None for a stranger: another user than ours."""
        assert self._listener is not None
        fd, _ = self._listener._accept()  # type: ignore[attr-defined] # not in typeshed
        caller = socket(AF_UNIX, SOCK_SEQPACKET, 0, fd)
        credentials = caller.getsockopt(SOL_SOCKET, SO_PEERCRED, _CREDENTIALS_BYTES)
        uid = int.from_bytes(credentials[4:8], sys.byteorder)  # pid, uid, gid
        if uid == os.geteuid():
            return caller
        caller.close()
        return None

    def admit(self, caller: socket) -> None:
        """This is the agent now."""
        self.agent = caller
        if self._poll is not None:
            self._poll.register(caller.fileno(), select.EPOLLIN)

    def hang_up(self) -> None:
        """The agent is gone."""
        agent, self.agent = self.agent, None
        if agent is None:
            return
        if self._poll is not None:
            self._poll.unregister(agent.fileno())
        agent.close()
        self._outbox.clear()  # all of it can be told again from what is kept
        self._waits_for_room = False

    # --- what is said -------------------------------------------------------------------------
    def receive(self) -> tuple[bytes, list[int]] | None:
        """One message with its descriptors, which are the caller's from now on: all, or none where
        there is no room for all. Empty once the agent is gone. None where nothing is said now."""
        if self.agent is None:
            return None
        space, flags = rights.room(_RUN_FDS_MAX), MSG_CMSG_CLOEXEC | MSG_DONTWAIT
        try:
            data, ancillary, how, _ = self.agent.recvmsg(MESSAGE_BYTES_MAX, space, flags)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b"", []
        fds = rights.taken(ancillary)
        if how & MSG_CTRUNC:  # by its place one would be taken for another
            for fd in fds:
                os.close(fd)
            fds = []
        return data, fds

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Queue, and send what there is room for. Without an agent nothing is queued."""
        if self.agent is not None:
            self._outbox.append((data, fds))
            self.flush()

    def flush(self) -> None:
        """Send what there is room for now, and watch for room for the rest."""
        while self._outbox and self.agent is not None:
            data, fds = self._outbox[0]
            try:
                self.agent.sendmsg([data], rights.beside(fds), MSG_DONTWAIT)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                self._outbox.clear()  # its end of file comes next
                break
            except OSError as error:
                if error.errno != errno.EMSGSIZE or not _has_long_detail(data):
                    raise
                self._outbox[0] = _shortened(data), fds
                continue
            del self._outbox[0]
        waits = bool(self._outbox)
        if self._poll is not None and self.agent is not None and waits != self._waits_for_room:
            self._waits_for_room = waits
            wanted = select.EPOLLIN | (select.EPOLLOUT if waits else 0)
            self._poll.modify(self.agent_fd, wanted)


def _has_long_detail(data: bytes) -> bool:
    return len(str(wire.loads(data).get("detail", ""))) > _DETAIL_MAX


def _shortened(data: bytes) -> bytes:
    """The same message with less detail: one that is too long for the socket is too long for ever,
    and what one job is told must not end all others."""
    message = wire.loads(data)
    message["detail"] = f"{str(message['detail'])[: _DETAIL_MAX - 2]} …"
    return wire.dumps(message)
