"""The journal's file: appended to, read once at the start, rewritten when it has grown.

Durability: a record is written (write(2), no buffer of ours) before it is acted upon, and nothing
is ever fsynced. What is written survives the death of every process; it may be lost only when the
machine itself crashes, and then no attempt is alive and the boot id tells: the node comes back as a
new incarnation, its attempts are released as lost and retried. An fsync would buy nothing but the
results that were waiting for Kafka at that moment, for milliseconds of disk per record.

A full disk is no fault but a state, `behind`: what is on disk stays as it is, whole, and what was
recorded since is in memory alone, until `catch_up` finds room. Who acts upon a record that must
outlive the process asks whether it does (`append` says).
"""

import errno
import os
from pathlib import Path
from typing import Final

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

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Journal:
    """One open journal. `state` is what it says; `same_incarnation` whether it was gone on with."""

    def __init__(self, path: Path, origin: Origin) -> None:
        """Reads what is there and writes it anew, compact, if there is room for that.

        Raises PlatformFaultError.
        """
        self._path = path
        self._fd = -1
        self.size_bytes = self._compact_bytes = 0
        self.behind = False
        """The disk lacks records that `state` has."""
        try:
            found = read(path.read_bytes() if path.exists() else b"")
            self.state, self.same_incarnation = take_over(found, origin)
            self.behind = not self._rewrite()
        except OSError as error:
            raise self._fault(error) from error

    @property
    def incarnation(self) -> Incarnation:
        """The node's: it lives as long as the journal (ADR 0006)."""
        opened = self.state.opened
        return Incarnation(opened.incarnation if opened is not None else 0)

    def append(self, record: Record) -> bool:
        """Writes one record, before it is acted upon. False where the disk has no room for it.

        Raises PlatformFaultError where it cannot be written for any other reason.
        """
        self.state.apply(record)
        if self.behind:
            return False
        try:
            self._write(frame(record))
            if self.size_bytes > max(COMPACT_BYTES_MIN, COMPACT_FACTOR * self._compact_bytes):
                self._rewrite()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise self._fault(error) from error
            os.ftruncate(self._fd, self.size_bytes)  # of the part that there was room for
            self.behind = True
        return not self.behind

    def catch_up(self) -> bool:
        """Writes all that is in memory alone. False: there is no room yet. Raises as `append`."""
        try:
            self.behind = not self._rewrite()
        except OSError as error:
            raise self._fault(error) from error
        return not self.behind

    def close(self) -> None:
        """No more records."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        write_all(self._fd, data)
        self.size_bytes += len(data)

    def _rewrite(self) -> bool:
        """A compact copy takes the journal's place by rename(2): there is always a whole one.

        False, and nothing is changed, where the disk has no room for the copy.
        """
        copy = self._path.with_name(f"{self._path.name}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        data = frames(self.state.records())
        fd = -1
        try:
            fd = os.open(copy, flags, 0o600)
            write_all(fd, data)
            copy.replace(self._path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            copy.unlink(missing_ok=True)
            if error.errno in NO_ROOM:
                return False
            raise
        self.close()
        self._fd, self.size_bytes, self._compact_bytes = fd, len(data), len(data)
        return True

    def _fault(self, error: OSError) -> PlatformFaultError:
        return PlatformFaultError(
            f"the journal {self._path} cannot be used ({error.strerror}); make room or choose "
            "another directory with --state-dir"
        )


def write_all(fd: int, data: bytes) -> None:
    """write(2) until everything is written. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
