# ruff: noqa: PTH102, PTH106, PTH108, PTH112, PTH211
# pathlib would add a third to the launcher's memory.
"""Roots of jobs that have an image: directories of the operator, or unpacked below the state
directory.

Each image that a job asked for has a mount namespace of its own here, made once, with that image as
its read-only root; init of such a job enters it and takes a copy (``init.py``; ADR 0013). Jobs
without an image are as before: nothing is mounted for them, and nothing has to be unmounted.

A root is an empty tmpfs with the entries of the image's top directory bound into it, read-only, so
that the places for what every job adds exist without a write to the image. Its content is hostile:
no link of it is followed before it is the root.
"""

from __future__ import annotations

import errno
import os
import stat
from _socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    socket,
    socketpair,
)
from itertools import islice

from node_agent.launcher import kernel, rights, rootfs

TYPE_CHECKING = False  # collections is another import
if TYPE_CHECKING:
    from collections.abc import Callable

# Each is a mount that every job of the image copies; images of distributions have about 20.
TOP_NAMES_MAX = 128
# Of etc/passwd and etc/group, to which the job's own line is added.
_NAMES_BYTES_MAX = 1 << 20
# Made by us, whatever the image has there.
_PLACES = ("proc", "dev", "tmp", "work")
_OWN = (*_PLACES, rootfs.DEVICES.strip("/"))
# Empty directories of the launcher's own root; only ever used in a namespace that is being made.
_SHELF = "/tmp"
_STAGING = "/work"
_JOB_ID = b"1000"
_PASSWD = b"job:x:1000:1000:job:/work:/bin/sh\n"
_GROUP = b"job:x:1000:\n"
_REPLY_BYTES_MAX = 4096
_RESOLVE = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_TMPFS = "size=4m,nr_inodes=1024,mode=755"


class Images:
    """Where images may lie, and the roots made of them so far. ``paths``: those that can be had."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.problems: list[str] = []
        self._sources: list[int] = []  # until they are on the shelf
        self._shelf = -1  # a mount namespace in which the sources are mounted below _SHELF
        self._roots: dict[str, int] = {}
        self._keep_proc = False

    def open(self, paths: list[str]) -> None:
        """Take hold of the directories while the host's tree is still in view.

        Without what else is mounted below them: jobs see one file system.
        """
        for path in paths:
            try:
                source = kernel.open_tree(kernel.AT_FDCWD, path, kernel.OPEN_TREE_CLONE)
            except OSError as error:
                self.problems.append(f"images in {path} cannot be used: {error.strerror}")
                continue
            self.paths.append(path)
            self._sources.append(source)

    def stage(self, *, keep_proc: bool) -> None:
        """Once the launcher has its own root: put them where only new roots find them."""
        self._keep_proc = keep_proc
        if self.paths:
            self._shelf = _namespace(-1, self._fill_shelf, keep_proc)
        for source in self._sources:
            os.close(source)
        self._sources.clear()

    def _fill_shelf(self) -> None:
        kernel.mount("images", _SHELF, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, _TMPFS)
        for number, source in enumerate(self._sources):
            os.mkdir(f"{_SHELF}/{number}")
            kernel.move_mount(source, f"{_SHELF}/{number}")

    def ready(self, image: str) -> None:
        """Make the root of ``image``, a path, unless it is there. Nothing for "", the host's root.

        Raises OSError: not one of ours, gone, or not fit to be a root.
        """
        if not image or image in self._roots:
            return
        number, below = self.locate(image)

        def build() -> None:
            with Opened(f"{_SHELF}/{number}", below) as source:
                assemble(source, _STAGING)
            self._take_over(_STAGING)

        try:
            self._roots[image] = _namespace(self._shelf, build, self._keep_proc)
        except OSError as error:
            raise OSError(error.errno, f"image {image}: {error.strerror}") from error

    def locate(self, image: str) -> tuple[int, str]:
        """Which of ``paths`` holds the image, and where below it."""
        for number, path in enumerate(self.paths):
            if image == path or image.startswith(path + "/"):
                return number, image[len(path) + 1 :] or "."
        raise OSError(errno.ENOENT, f"image {image} is not among those of this launcher")

    def _take_over(self, root: str) -> None:
        """Change to the new root, with what the launcher's own has of devices (and of /proc)."""
        moved = ["/dev"] + (["/proc"] if self._keep_proc else [])
        if os.path.isdir(rootfs.DEVICES):
            os.mkdir(root + rootfs.DEVICES)
            moved.append(rootfs.DEVICES)
        for path in moved:
            flags = kernel.OPEN_TREE_CLONE | kernel.AT_RECURSIVE
            tree = kernel.open_tree(kernel.AT_FDCWD, path, flags)
            kernel.move_mount(tree, root + path)
            os.close(tree)
        os.mkdir(f"{root}/old-root")
        os.chdir(root)
        kernel.pivot_root(".", "old-root")
        os.chdir("/")
        kernel.umount("/old-root")
        os.rmdir("/old-root")
        kernel.mount_setattr(kernel.AT_FDCWD, "/", kernel.AT_RECURSIVE, kernel.MOUNT_ATTR_RDONLY)

    def namespace(self, image: str) -> int:
        """The mount namespace whose root the image is, which `ready` has made; -1 for ""."""
        return self._roots[image] if image else -1


class Opened:
    """A directory for reading, reached from the path ``base`` through no link."""

    def __init__(self, base: str, below: str) -> None:
        start = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            self._fd = kernel.openat2(start, below, flags, _RESOLVE)
        finally:
            os.close(start)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _namespace(base: int, build: Callable[[], None], keep_proc: bool) -> int:
    """A new mount namespace as a descriptor: a copy of ``base`` (-1: of ours) after ``build``.

    A child makes it and sends it; it lives on without the child. Raises OSError of ``build``.
    """
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)
    pid = os.fork()
    if pid == 0:
        _make_namespace(theirs, base, build, keep_proc)
    theirs.close()
    try:
        data, ancillary, _, _ = ours.recvmsg(_REPLY_BYTES_MAX, rights.room(1), MSG_CMSG_CLOEXEC)
    finally:
        ours.close()
        os.waitpid(pid, 0)
    if fds := rights.taken(ancillary):
        return fds[0]
    number, _, text = data.decode("utf-8", "replace").partition("\t")
    raise OSError(int(number or errno.EIO), text or "the child that makes a root died")


def _make_namespace(answer: socket, base: int, build: Callable[[], None], keep_proc: bool) -> None:
    """Body of the child. Never returns: this is a copy of the launcher."""
    try:
        if base >= 0:
            kernel.setns(base, kernel.CLONE_NEWNS)
        kernel.unshare(kernel.CLONE_NEWNS)
        build()
        if not keep_proc:
            private = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("proc", "/proc", "proc", private)
        own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        if not keep_proc:
            kernel.umount("/proc")
        answer.sendmsg([b"+"], rights.beside([own]))
    except BaseException as error:  # noqa: BLE001 - the last frame of a forked process
        number, text = 0, f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            number, text = error.errno or 0, error.strerror or ""
        answer.send(f"{number}\t{text}".encode("utf-8", "replace")[:_REPLY_BYTES_MAX])
    finally:
        os._exit(0)


def assemble(source: int, root: str) -> None:
    """Mount at ``root`` the image below ``source``, an open directory, with places for what each
    job adds. Raises OSError."""
    with os.scandir(source) as entries:
        names = sorted(entry.name for entry in islice(entries, TOP_NAMES_MAX + 1))
    if len(names) > TOP_NAMES_MAX:
        detail = f"the image's top directory has more than {TOP_NAMES_MAX} entries"
        raise OSError(errno.E2BIG, detail)
    kernel.mount("outrider", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, _TMPFS)
    for name in _PLACES:
        os.mkdir(f"{root}/{name}", 0o755)
    for name in names:
        if name not in _OWN:
            _show(source, name, f"{root}/{name}")
    if not os.path.lexists(f"{root}/etc"):
        os.mkdir(f"{root}/etc", 0o755)
        _write(f"{root}/etc/passwd", _PASSWD)
        _write(f"{root}/etc/group", _GROUP)
        return
    _name_the_job(root, "passwd", _PASSWD)
    _name_the_job(root, "group", _GROUP)


def _show(source: int, name: str, target: str) -> None:
    """One entry of the image's top directory; what is neither file, folder nor link is left out."""
    mode = os.stat(name, dir_fd=source, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(name, dir_fd=source), target)
        return
    if stat.S_ISDIR(mode):
        os.mkdir(target, 0o755)
    elif stat.S_ISREG(mode):
        _write(target, b"")
    else:
        return
    flags = kernel.OPEN_TREE_CLONE | kernel.AT_SYMLINK_NOFOLLOW
    tree = kernel.open_tree(source, name, flags)
    try:
        attributes = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
        kernel.mount_setattr(tree, "", kernel.AT_EMPTY_PATH, attributes)
        kernel.move_mount(tree, target)
    finally:
        os.close(tree)


def _write(path: str, data: bytes) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o444)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _name_the_job(root: str, name: str, line: bytes) -> None:
    """Cover the image's list of users or groups by one that has the job, too.

    Not where its number has a name there, or where the image has no such regular file: then there
    is no place to mount one on, and the job does without a name.
    """
    found = _read(root, f"etc/{name}")
    if found is None or any(row.split(b":")[2:3] == [_JOB_ID] for row in found.splitlines()):
        return
    end = b"" if found.endswith(b"\n") or not found else b"\n"
    added = f"{root}/.outrider-{name}"
    _write(added, found + end + line)
    kernel.mount(added, f"{root}/etc/{name}", "", kernel.MS_BIND)
    os.unlink(added)


def _read(root: str, path: str) -> bytes | None:
    """A small regular file below ``root`` that is reached through no link; None for any other."""
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = kernel.openat2(base, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, _RESOLVE)
    except OSError:
        return None  # not there, a link, or not readable for us: left as it is
    finally:
        os.close(base)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _NAMES_BYTES_MAX:
            return None
        return os.read(fd, _NAMES_BYTES_MAX)
    finally:
        os.close(fd)
