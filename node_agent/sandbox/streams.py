"""Pumps between the agent and a job's three pipes: never blocking, always bounded.

A job that floods its output is truncated and drained, not stopped; a job that never reads its
standard input, or closes its output early, hangs nobody.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

# The kernel's default pipe capacity: one wake-up empties a full pipe.
CHUNK_BYTES = 65_536


class OutputPump:
    """Reads one pipe to its end; hands on at most ``bytes_max`` bytes and discards the rest."""

    def __init__(self, fd: int, bytes_max: int, sink: Callable[[bytes], None] | None) -> None:
        self._fd, self._room, self._sink = fd, bytes_max, sink
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.bytes_seen = 0
        self.truncated = False
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a pipe that cannot be read has ended
        if not data:
            self.close()
            return
        self.bytes_seen += len(data)
        kept = data[: self._room]
        self._room -= len(kept)
        self.truncated = self.truncated or len(kept) < len(data)
        if kept and self._sink is not None:
            try:
                self._sink(kept)
            except Exception as error:  # noqa: BLE001 - the caller's callback: told once, via done
                self._sink = None
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": "output callback of a sandboxed job raised", "exception": error}
        )

    def close(self) -> None:
        """Stop reading and close the pipe."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if not self.done.done():
            self.done.set_result(None)


class InputPump:
    """Writes the payload into one pipe as the job takes it."""

    def __init__(self, fd: int, payload: bytes) -> None:
        self._fd, self._rest = fd, memoryview(payload)
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._on_writable()
        if self._fd >= 0:
            self._loop.add_writer(self._fd, self._on_writable)
            self._watching = True

    _watching = False

    def _on_writable(self) -> None:
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest[:CHUNK_BYTES]) :]
        except BlockingIOError:
            return
        except OSError:
            self._rest = memoryview(b"")  # EPIPE: the job closed its standard input, as it may
        self.close()

    def close(self) -> None:
        """Stop writing and close the pipe, which the job reads as end of file."""
        if self._fd >= 0:
            if self._watching:
                self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
