"""A job's standard input and output on the agent's side: never blocking, always bounded.

A job that floods its output is truncated and drained, not stopped; a job that never reads its
standard input, or closes its output early, hangs nobody.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterable

# The kernel's default pipe capacity (16 pages): one wake-up empties a full pipe.
CHUNK_BYTES = 65_536
# Each read is a piece of its own from here to Kafka, which costs a hundred bytes and a record
# however small it is. After so many small ones the pipe is let fill a little between two: a job
# that writes single bytes makes a hundred pieces a second, not thousands. What is large is never
# delayed.
SMALL_BYTES = 4096
SMALL_READS_FREE = 32
PAUSE_S = 0.01
# What a new pipe holds even for a user who has too many of them (pipe(7), pipe-user-pages-soft).
_PIPE_BYTES_MIN = 4096
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class OutputPump:
    """Reads one pipe to its end; hands on at most ``bytes_max`` bytes and discards the rest."""

    def __init__(
        self, fd: int, bytes_max: int, sink: Callable[[bytes], None] | None, seen: int = 0
    ) -> None:
        """``seen``: bytes of this stream that an earlier reader of the pipe has handed on."""
        self._fd, self._room, self._sink = fd, max(0, bytes_max - seen), sink
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.bytes_seen = seen
        # An earlier reader that handed on all there was room for has discarded the rest.
        self.truncated = 0 < bytes_max <= seen
        self._small = 0
        self._pause: asyncio.TimerHandle | None = None
        self._hurries = False
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
        if len(data) < SMALL_BYTES and not self._hurries:
            self._small += 1
            if self._small > SMALL_READS_FREE:
                self._loop.remove_reader(self._fd)
                self._pause = self._loop.call_later(PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._on_readable)

    def hurry(self) -> None:
        """The writers are gone: reads what is left without a pause."""
        self._hurries = True
        if self._pause is not None:
            self._pause.cancel()
            self._go_on()

    def _fail(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": "output callback of a sandboxed job raised", "exception": error}
        )

    def close(self) -> None:
        """Stop reading and close the pipe."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if not self.done.done():
            self.done.set_result(None)


def input_of(payload: bytes) -> tuple[int, tuple[int, ...]]:
    """A job's standard input: the read end of its pipe, and what the launcher needs to fill it.

    The agent never feeds a running job: one that died half-way would make the job read a truncated
    payload as if it were whole. A small payload is in the pipe before the job starts; a larger one
    is handed over in sealed memory with the write end, and the launcher feeds it. The caller
    closes all of them. Raises OSError.
    """
    read, write = os.pipe()
    try:
        if len(payload) > _PIPE_BYTES_MIN:
            return read, (pack([payload]), write)
        os.write(write, payload)
    except OSError:
        os.close(read)
        os.close(write)
        raise
    os.close(write)
    return read, ()


def pack(parts: Iterable[bytes]) -> int:
    """Sealed memory that holds the parts one after the other, at its beginning. Raises OSError."""
    memory = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(memory, rest) :]
        os.lseek(memory, 0, os.SEEK_SET)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memory)
        raise
    return memory
