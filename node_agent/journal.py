"""The journal's file: appended to, read once at the start, rewritten when it has grown.

Durability: a record is written (write(2), no buffer of ours) before it is acted upon, and nothing
is ever fsynced. What is written survives the death of every process; it may be lost only when the
machine itself crashes, and then no attempt is alive and the boot id tells: the node comes back as a
new incarnation, its attempts are released as lost and retried. An fsync would buy nothing but the
results that were waiting for Kafka at that moment, for milliseconds of disk per record.
"""

import os
from pathlib import Path

from idl.errors import PlatformFaultError
from idl.ids import Incarnation
from node_agent.core.journal import (
    COMPACT_BYTES_MIN,
    COMPACT_FACTOR,
    Origin,
    Record,
    frame,
    frames,
    read,
    take_over,
)


class Journal:
    """One open journal. `state` is what it says; `same_incarnation` whether it was gone on with."""

    def __init__(self, path: Path, origin: Origin) -> None:
        """Reads what is there and writes it anew, compact. Raises PlatformFaultError."""
        self._path = path
        self._fd = -1
        self.size_bytes = 0
        try:
            found = read(path.read_bytes() if path.exists() else b"")
            self.state, self.same_incarnation = take_over(found, origin)
            self._rewrite()
        except OSError as error:
            raise self._fault(error) from error

    @property
    def incarnation(self) -> Incarnation:
        """The node's: it lives as long as the journal (ADR 0006)."""
        opened = self.state.opened
        return Incarnation(opened.incarnation if opened is not None else 0)

    def append(self, record: Record) -> None:
        """Writes one record; only then may it be acted upon. Raises PlatformFaultError."""
        self.state.apply(record)
        try:
            self._write(frame(record))
            if self.size_bytes > max(COMPACT_BYTES_MIN, COMPACT_FACTOR * self._compact_bytes):
                self._rewrite()
        except OSError as error:
            raise self._fault(error) from error

    def close(self) -> None:
        """No more records."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self.size_bytes += len(data)

    def _rewrite(self) -> None:
        """A compact copy takes the journal's place by rename(2): there is always a whole one."""
        copy = self._path.with_name(f"{self._path.name}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self.close()
        self._fd, self.size_bytes = os.open(copy, flags, 0o600), 0
        self._write(frames(self.state.records()))
        self._compact_bytes = self.size_bytes
        copy.replace(self._path)

    def _fault(self, error: OSError) -> PlatformFaultError:
        return PlatformFaultError(
            f"the journal {self._path} cannot be used ({error.strerror}); make room or choose "
            "another directory with --state-dir"
        )
