"""Room on the disk of the agent's state directory: where it runs out, the node drains.

Before the disk is full, so that what runs can still be written down: ends of attempts, and their
output. Jobs themselves write to memory (their /work is a tmpfs) and are not touched by this.
"""

import os
from pathlib import Path
from typing import Final

from idl.units import MIB
from node_agent.journal import Journal

FREE_BYTES_MIN: Final = 16 * MIB
"""Below it nothing new is taken: a journal compacts at 1 MiB, an attempt's output at most 4 MiB."""
FREE_BYTES_AGAIN: Final = 32 * MIB
"""From here on work is taken again; apart, so that a node on the edge does not flicker."""
FREE_FILES_MIN: Final = 64
"""Inodes; each attempt with output needs one."""


class Room:
    """One file system, looked at now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._short = False
        self.free_bytes = 0

    def look(self, journal: Journal) -> str:
        """Why no new work may be taken, "" where it may; lets the journal catch up.

        The words do not change with the figures: each new one would be a decision of the leader.
        Raises PlatformFaultError where the journal cannot be written for another reason.
        """
        full = journal.behind and not journal.catch_up()
        found = os.statvfs(self._path)
        self.free_bytes = found.f_bavail * found.f_frsize
        if found.f_files and found.f_favail < FREE_FILES_MIN:  # 0 files: none are counted
            return "its state directory's disk has no inodes left"
        wanted = FREE_BYTES_AGAIN if self._short else FREE_BYTES_MIN
        self._short = full or self.free_bytes < wanted
        return "its state directory's disk is full" if self._short else ""
