# ruff: noqa: PTH123
# pathlib would add a third to the launcher's memory.
"""Reading and writing the small files of cgroups, through descriptors of their directories.

And reading tables of /proc/self, in which others chose the names.
"""

from __future__ import annotations

import os

_READ_MAX = 1 << 16


def read_table(path: str) -> str:
    """A table of proc(5) whose names may be any bytes: what is no UTF-8 can be made bytes again
    (os.fsencode), and a carriage return is no end of a line."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read()


def rows_of(table: str) -> list[str]:
    """Its lines. The kernel escapes newlines in names, but none of what `str.splitlines` takes for
    one besides: form feeds, U+2028."""
    return [row for row in table.split("\n") if row]


def write_at(dir_fd: int, name: str, text: str) -> None:
    """Write one cgroup file."""
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_at(dir_fd: int, name: str) -> str:
    """Read one cgroup file; empty when this kernel has no such file."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, _READ_MAX).decode()
    finally:
        os.close(fd)


def write_if_present(dir_fd: int, name: str, text: str) -> None:
    """Write a file that some kernels lack, e.g. without swap accounting: nothing to limit then."""
    try:
        write_at(dir_fd, name, text)
    except FileNotFoundError:
        return


def write_all(dir_fd: int, files: list[tuple[str, str]]) -> None:
    """Write (name, text) in order; a name that ends in ``?`` may be missing."""
    for name, text in files:
        if name.endswith("?"):
            write_if_present(dir_fd, name[:-1], text)
        else:
            write_at(dir_fd, name, text)


def keyed_value(text: str, key: str) -> int:
    """The number after ``key`` in a flat keyed file (memory.events, cpu.stat, oom_control)."""
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == key:
            return int(words[1])
    return 0
