"""What the launcher keeps so that an agent may be away: payloads, ends, results, output.

Output is not copied while it waits: the launcher holds the read ends of the job's pipes beside the
agent, so that a pipe outlives its reader, and makes them larger when nobody reads.
"""

from __future__ import annotations

import fcntl
import os
import sys

from node_agent.launcher import wire

# fcntl(2); the largest pipe an ordinary user may have (/proc/sys/fs/pipe-max-size, stock kernels).
_F_SETPIPE_SZ = 1031
_FIONREAD = 0x541B  # ioctl_pipe(2): bytes in the pipe
PIPE_BYTES_MAX = 1 << 20
_PIPE_BYTES_DEFAULT = 1 << 16
_COPY_BYTES = 1 << 20


class Outputs:
    """The read ends of one job's standard output and error."""

    def __init__(self, fds: list[int], caps: list[int]) -> None:
        self.fds, self._caps = fds, caps
        self._waiting = 0

    def moved(self) -> bool:
        """Something was written since the last call, and not all of it was read meanwhile.

        What the agent reads at once is seen by the agent alone, which then says so.
        """
        before, self._waiting = self._waiting, sum(_waiting_bytes(fd) for fd in self.fds)
        return self._waiting not in (0, before)

    def grow(self) -> None:
        """Nobody reads for a while: make room for all that would be kept of the output.

        Twice the cap, because a pipe counts pages, not bytes. A job that writes more than that
        waits in write(2), as it would for any slow reader.
        """
        for fd, cap in zip(self.fds, self._caps, strict=True):
            wanted = min(2 * cap, PIPE_BYTES_MAX)
            if wanted <= _PIPE_BYTES_DEFAULT:
                continue
            try:
                fcntl.fcntl(fd, _F_SETPIPE_SZ, wanted)
            except OSError:
                continue  # this user may not: the job waits sooner, nothing is lost

    def close(self) -> None:
        """Nobody will read any more."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def _waiting_bytes(fd: int) -> int:
    count = bytearray(4)
    fcntl.ioctl(fd, _FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


class Feed:
    """A large payload on its way into a job's standard input."""

    def __init__(self, memory_fd: int, pipe_fd: int) -> None:
        """Takes both: the payload, at its beginning, and the write end of the pipe."""
        self.memory_fd, self.pipe_fd = memory_fd, pipe_fd
        os.set_blocking(pipe_fd, False)

    def on_writable(self) -> bool:
        """Fill the pipe. True once all is in it, or the job reads no more."""
        try:
            while os.sendfile(self.pipe_fd, self.memory_fd, None, _COPY_BYTES):
                continue
        except BlockingIOError:
            return False
        except OSError:
            return True  # EPIPE: the job closed its standard input, as it may
        return True

    def close(self) -> None:
        """The job reads the end of the payload."""
        os.close(self.memory_fd)
        os.close(self.pipe_fd)


class Kept:
    """One attempt's end until the agent has stored it: the message and what goes with it.

    ``fds``: of the result, of the work directory; -1 where there is none.
    """

    def __init__(self, outcome: dict[str, object], fds: tuple[int, int]) -> None:
        self.fds = [fd for fd in fds if fd >= 0]
        names = [name for name, fd in zip(("result", "work"), fds, strict=True) if fd >= 0]
        self.message = wire.dumps({"op": "ended", "fds": names, **outcome})

    def close(self) -> None:
        """The agent has it."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def detached(fd: int, size_max: int) -> int:
    """A copy of the result in memory of its own: the descriptor of the file itself would keep the
    whole of the job's /work in memory for as long as the agent is away. Closes ``fd``."""
    try:
        copy = os.memfd_create("result", os.MFD_CLOEXEC)
        left = size_max
        while left > 0 and (count := os.sendfile(copy, fd, None, min(left, _COPY_BYTES))):
            left -= count
    finally:
        os.close(fd)
    return copy
