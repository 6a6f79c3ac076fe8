"""One attempt's output on disk until its result is in Kafka, so that a restart loses none of it.

Frames in the order of reading: stream, time, length, bytes. After a restart they are written to
Kafka again from the first one: the same frames make the same chunks with the same numbers, and
readers of `logs` take each number once. Never fsynced: an attempt does not outlive the machine.
"""

import os
import struct
from pathlib import Path
from typing import Final, Literal, NamedTuple

Stream = Literal["stdout", "stderr"]
_STREAMS: Final[tuple[Stream, Stream]] = ("stdout", "stderr")
_HEAD: Final = struct.Struct("<BQI")


class Piece(NamedTuple):
    """What one read of a pipe gave, capped by the plan: LOG_BYTES_MAX in all per attempt."""

    stream: Stream
    data: bytes
    at_ms: int


class Spool:
    """One file, made with the first byte of output."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def recover(self) -> list[Piece]:
        """What an earlier process wrote. A torn last frame becomes a whole shorter one.

        Raises OSError.
        """
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        pieces: list[Piece] = []
        at = 0
        while at + _HEAD.size <= len(data):
            stream, at_ms, size = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + size]
            if stream >= len(_STREAMS):
                break
            piece = Piece(_STREAMS[stream], body, at_ms)
            if len(body) < size:
                os.truncate(self._path, at)
                if body:
                    self.append(piece)
                    pieces.append(piece)
                return pieces
            pieces.append(piece)
            at += _HEAD.size + size
        os.truncate(self._path, at)
        return pieces

    def append(self, piece: Piece) -> None:
        """Raises OSError."""
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
        head = _HEAD.pack(_STREAMS.index(piece.stream), piece.at_ms, len(piece.data))
        rest = memoryview(head + piece.data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def close(self) -> None:
        """Keeps the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The output is in Kafka."""
        self.close()
        self._path.unlink(missing_ok=True)
