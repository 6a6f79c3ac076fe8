"""Lays the layers of an image into a directory. They are hostile, and never leave it.

Every name is looked up by the kernel with that directory as its root (openat2(2), RESOLVE_IN_ROOT),
so that links of earlier layers may be followed and lead nowhere else; the last part of a name is
never followed. Nothing is written to what was there: it is removed first, so that no hard link and
no open file of an earlier layer is written through. Owners, setuid bits and attributes are not
taken over, devices and FIFOs are left out; all is ours, readable for all, writable for us alone.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from node_agent.images.bounds import DEPTH_MAX, Budget, ImageRefusedError
from node_agent.images.tar import Entry, TarReader
from node_agent.launcher import kernel

_RESOLVE: Final = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS | kernel.RESOLVE_NO_XDEV
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_META: Final = b".wh..wh."
"""What aufs keeps beside its whiteouts: no part of an image."""
_NAME_SHOWN_MAX: Final = 120


class Layer(Protocol):
    """One layer, that can be read again."""

    def opened(self, budget: Budget) -> AbstractContextManager[TarReader]:
        """From its start; at the block's end it is checked against its digests."""


class Root:
    """The directory that becomes the root of jobs."""

    def __init__(self, root_fd: int, budget: Budget) -> None:
        """`root_fd` is an open directory, and stays the caller's."""
        self._root = root_fd
        self._budget, self._looking = budget, budget.another()
        self.left_out = 0
        self._layers = 0
        self._folder: tuple[bytes, int] | None = None
        self._depth_base = _depth(root_fd)

    def close(self) -> None:
        """Nothing more is laid."""
        self._forget_folder()

    def lay(self, layer: Layer) -> None:
        """One layer over those before. Raises ImageRefusedError.

        It is read twice, but for the first: what it removes is gone from the layers below before
        anything of it is laid, whatever the order of its entries.
        """
        if self._layers:
            self._each(layer, self._looking, self._whiteout)
        self._layers += 1
        self._each(layer, self._budget, self._lay_entry)

    @staticmethod
    def _each(layer: Layer, budget: Budget, act: Callable[[Entry, TarReader], None]) -> None:
        with layer.opened(budget) as tar:
            for entry in tar:
                budget.spend_entry()
                try:
                    act(entry, tar)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise ImageRefusedError(f"entry {_shown(entry.name)}: {reason}") from error

    # --- what a layer removes -----------------------------------------------------------------
    def _whiteout(self, entry: Entry, _tar: TarReader) -> None:
        *folders, name = _parts(entry.name) or [b""]
        if not name.startswith(_WHITEOUT):
            return
        try:
            parent = self._open(folders)
        except (FileNotFoundError, NotADirectoryError):
            return  # the layers below have nothing there
        try:
            if name == _OPAQUE:
                with os.scandir(parent) as entries:
                    names = [os.fsencode(child.name) for child in entries]
                for child in names:
                    self._remove(parent, child)
            elif not name.startswith(_META):
                self._remove(parent, _removed(entry.name, name))
        finally:
            os.close(parent)

    def _remove(self, parent: int, name: bytes) -> None:
        """Whatever is there, if anything is; links are removed, not followed."""
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            shutil.rmtree(os.fsdecode(name), dir_fd=parent)
            self._forget_folder()
        else:
            os.unlink(name, dir_fd=parent)
            if stat.S_ISLNK(mode):
                self._forget_folder()

    # --- what a layer adds --------------------------------------------------------------------
    def _lay_entry(self, entry: Entry, tar: TarReader) -> None:
        parts = _parts(entry.name)
        if not parts:
            if entry.kind != "directory":
                raise ImageRefusedError(f"entry {_shown(entry.name)} would be the root itself")
            return
        *folders, name = parts
        if name.startswith(_WHITEOUT):
            return
        if entry.kind == "other":
            self.left_out += 1
            return
        parent = self._place(folders)
        if entry.kind == "hardlink":
            self._link(entry, parent, name)
        elif entry.kind == "directory":
            if not self._is_directory(parent, name):
                self._remove(parent, name)
                os.mkdir(name, 0o755, dir_fd=self._place(folders))
        else:
            self._remove(parent, name)
            parent = self._place(folders)
            if entry.kind == "symlink":
                os.symlink(entry.link, name, dir_fd=parent)
            else:
                _write(parent, name, entry, tar.body())

    @staticmethod
    def _is_directory(parent: int, name: bytes) -> bool:
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    def _link(self, entry: Entry, parent: int, name: bytes) -> None:
        *folders, other = _parts(entry.link) or [b""]
        if not other:
            raise ImageRefusedError(f"entry {_shown(entry.name)} is a hard link to the root")
        source = self._open(folders)
        try:
            facts = os.stat(other, dir_fd=source, follow_symlinks=False)
            if not (stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode)):
                raise OSError(errno.EPERM, "a hard link to what is no file")
            try:
                there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                there = None
            if there is not None and os.path.samestat(there, facts):
                return
            self._remove(parent, name)
            os.link(other, name, src_dir_fd=source, dst_dir_fd=self._place(_parts(entry.name)[:-1]),
                    follow_symlinks=False)  # fmt: skip
        finally:
            os.close(source)

    # --- folders ------------------------------------------------------------------------------
    def _open(self, folders: list[bytes]) -> int:
        return kernel.openat2(self._root, b"/".join(folders) or b".", _DIRECTORY, _RESOLVE)

    def _place(self, folders: list[bytes]) -> int:
        """The folder, made where it is missing; ours to close. Most entries share the last one."""
        path = b"/".join(folders)
        if self._folder is not None and self._folder[0] == path:
            return self._folder[1]
        self._forget_folder()
        try:
            found = self._open(folders)
        except FileNotFoundError:
            found = self._make(folders)
        if _depth(found) - self._depth_base >= DEPTH_MAX:
            os.close(found)
            raise OSError(errno.ENAMETOOLONG, f"deeper than {DEPTH_MAX} folders")
        self._folder = path, found
        return found

    def _make(self, folders: list[bytes]) -> int:
        """Every part that is missing; a link that leads nowhere is in the way, and refused."""
        if len(folders) > DEPTH_MAX:
            raise OSError(errno.ENAMETOOLONG, f"deeper than {DEPTH_MAX} folders")
        at = self._open([])
        for number, name in enumerate(folders, 1):
            try:
                try:
                    found = self._open(folders[:number])
                except FileNotFoundError:
                    os.mkdir(name, 0o755, dir_fd=at)
                    found = self._open(folders[:number])
            finally:
                os.close(at)
            at = found
        return at

    def _forget_folder(self) -> None:
        if self._folder is not None:
            os.close(self._folder[1])
            self._folder = None


def _write(parent: int, name: bytes, entry: Entry, body: Iterator[bytes]) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        for data in body:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        os.fchmod(fd, 0o755 if entry.executable else 0o644)
        os.utime(fd, (entry.mtime_s, entry.mtime_s))
    finally:
        os.close(fd)


def _parts(name: bytes) -> list[bytes]:
    """Its parts below the root: a leading slash means the root, as everywhere in an image."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ImageRefusedError(f"entry {_shown(name)} has '..' in its name")
    return parts


def _removed(whole: bytes, name: bytes) -> bytes:
    target = name.removeprefix(_WHITEOUT)
    if target in (b"", b".", b".."):
        raise ImageRefusedError(f"entry {_shown(whole)} removes nothing that has a name")
    return target


def _depth(fd: int) -> int:
    """How many folders lead to an open one, whatever links were followed to it."""
    return str(Path(f"/proc/self/fd/{fd}").readlink()).count("/")


def _shown(name: bytes) -> str:
    return ascii(name[:_NAME_SHOWN_MAX].decode("utf-8", "replace"))
