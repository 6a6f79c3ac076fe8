"""Finds and reads the files that a job leaves in its work directory.

The job is dead, so nothing changes meanwhile; what it left is hostile all the same. Every name is
opened by the kernel beneath the directory, through no link and into no other file system
(openat2(2)); only regular files are read; names, depth, count and bytes are bounded.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from idl import limits as bound
from node_agent.launcher import kernel

# What was left out is told, up to so many names: a job may leave a million odd ones.
MISSING_TOLD_MAX = 64
_RESOLVE = (
    kernel.RESOLVE_BENEATH
    | kernel.RESOLVE_NO_SYMLINKS
    | kernel.RESOLVE_NO_MAGICLINKS
    | kernel.RESOLVE_NO_XDEV
)
_WILD = frozenset("*?[")


class FoundFile(NamedTuple):
    """One file to collect: its path below the work directory as the kernel has it, its size."""

    path: str
    size_bytes: int

    @property
    def name(self) -> str:
        """The path as it is told (``escaped``)."""
        return escaped(self.path)


class Listing(NamedTuple):
    """What there is, and what was asked for or found but is not collected, with the reason."""

    files: tuple[FoundFile, ...]
    missing: dict[str, str]


def escaped(path: str) -> str:
    """``path`` with '%' and every byte that is no printable UTF-8 as %XX."""
    return "".join(
        char
        if char != "%" and char.isprintable()
        else "".join(f"%{byte:02X}" for byte in os.fsencode(char))
        for char in path
    )


def find(work_fd: int, patterns: tuple[str, ...]) -> Listing:
    """The files below ``work_fd`` (a directory, may be O_PATH) that the patterns name, in order.

    A pattern is a path whose parts may have wildcards (``* ? [``); with ``/`` at its end it is a
    folder and means all below it. Never raises OSError: even the work directory itself may be one
    that we are not let into.
    """
    search = _Search()
    for pattern in patterns:
        search.hit = False
        try:
            with _Directory(work_fd, ".") as root:
                search.match(root, pattern.split("/"), "")
        except OSError as error:
            search.miss(pattern, error.strerror or "cannot be opened")
        if not search.hit:
            search.miss(pattern, "not there")
    return Listing(tuple(search.files.values()), search.missing)


def read(work_fd: int, found: FoundFile) -> bytes:
    """The bytes of a found file. Raises OSError."""
    fd = kernel.openat2(work_fd, found.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, _RESOLVE)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        parts, left = [], found.size_bytes
        while left > 0 and (data := os.read(fd, left)):
            parts.append(data)
            left -= len(data)
        return b"".join(parts)
    finally:
        os.close(fd)


class _Search:
    def __init__(self) -> None:
        self.files: dict[str, FoundFile] = {}
        self.missing: dict[str, str] = {}
        self.hit = False  # the pattern named something
        self._bytes = 0
        self._names_left = bound.OUTPUT_NAMES_SEEN_MAX

    def miss(self, path: str, why: str) -> None:
        """Tell that this is not collected."""
        self.hit = True
        if len(self.missing) < MISSING_TOLD_MAX:
            self.missing.setdefault(escaped(path), why)
        else:
            self.missing["…"] = "and more"

    def match(self, fd: int, parts: list[str], prefix: str) -> None:
        """Everything below the open directory that the rest of a pattern names."""
        first, rest = parts[0], parts[1:]
        if not first:  # the end of `folder/`
            self._all_below(fd, prefix)
        elif not _WILD & frozenset(first):
            self._one(fd, first, rest, prefix)
        else:
            for name in self._names(fd, prefix):
                if fnmatchcase(name, first):
                    self._one(fd, name, rest, prefix)

    def _one(self, fd: int, name: str, rest: list[str], prefix: str) -> None:
        path = prefix + name
        try:
            facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if rest:
            if stat.S_ISDIR(facts.st_mode):
                with _Directory(fd, name) as inner:
                    self.match(inner, rest, path + "/")
            else:
                self.miss(path, "not a folder")
        elif stat.S_ISREG(facts.st_mode):
            self._take(path, facts.st_size)
        else:
            self.miss(path, "not a regular file")

    def _all_below(self, fd: int, prefix: str) -> None:
        if prefix.count("/") >= bound.FILE_DEPTH_MAX:
            self.miss(prefix, f"deeper than {bound.FILE_DEPTH_MAX} folders")
            return
        for name in self._names(fd, prefix):
            facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                with _Directory(fd, name) as inner:
                    self._all_below(inner, f"{prefix}{name}/")
            elif stat.S_ISREG(facts.st_mode):
                self._take(prefix + name, facts.st_size)
            else:
                self.miss(prefix + name, "not a regular file")

    def _names(self, fd: int, prefix: str) -> Iterator[str]:
        """Names of a directory in order, as many as may still be looked at."""
        names = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if self._names_left == 0:
                    most = bound.OUTPUT_NAMES_SEEN_MAX
                    self.miss(prefix or "/", f"more than {most} names; collect an archive")
                    break
                self._names_left -= 1
                names.append(entry.name)
        yield from sorted(names)

    def _take(self, path: str, size: int) -> None:
        self.hit = True
        if path in self.files:
            return
        if size > bound.RESULT_BYTES_MAX:
            self.miss(path, f"has {size} bytes, at most {bound.RESULT_BYTES_MAX}")
        elif self._bytes + size > bound.OUTPUT_FILES_BYTES_MAX:
            self.miss(path, f"all files together may have {bound.OUTPUT_FILES_BYTES_MAX} bytes")
        elif len(self.files) == bound.OUTPUT_FILES_MAX:
            self.miss(path, f"more than {bound.OUTPUT_FILES_MAX} files; collect an archive")
        elif len(os.fsencode(path)) > bound.FILE_NAME_BYTES_MAX:
            self.miss(path[:80], f"its name has more than {bound.FILE_NAME_BYTES_MAX} bytes")
        else:
            self.files[path] = FoundFile(path, size)
            self._bytes += size


class _Directory:
    """An open directory of a work directory, reached through no link."""

    def __init__(self, parent_fd: int, name: str) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        self._fd = kernel.openat2(parent_fd, name, flags, _RESOLVE)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
