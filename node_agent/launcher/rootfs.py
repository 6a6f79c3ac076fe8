# ruff: noqa: PTH103, PTH106, PTH108, PTH110, PTH112, PTH113, PTH114, PTH115, PTH116, PTH120, PTH123, PTH202, PTH211
# pathlib would add a third to the launcher's memory.
"""The read-only root that every job starts from.

Built once, by the launcher, in its own mount namespace: an empty tmpfs into which only the visible
host paths are bound, read-only. What is not listed does not exist there, so nothing has to be
hidden. The launcher pivots into it; a job's mount namespace is a copy that gets its private
filesystems on top, and the host's tree is not in it to be found.
"""

from __future__ import annotations

import errno
import os
import stat

from node_agent.launcher import kernel

# Enough for directories, symlinks and the copied files of /etc.
_ROOT_TMPFS = "size=16m,nr_inodes=4096,mode=755"
# A file of /etc is copied (no mount to clone for every job) up to this size.
_ETC_COPY_BYTES_MAX = 1 << 20
# Binds live here until a job has taken its devices from them; then it is unmounted.
DEVICES = "/.devices"
STAGING = "/tmp"  # only ever used in the launcher's own mount namespace

DEV_FLAGS = kernel.MS_NOSUID | kernel.MS_NOEXEC
DEV_OPTIONS = "size=64k,nr_inodes=256,mode=755"
DEVICE_NODES = ("null", "zero", "full", "random", "urandom")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
# World-readable files of /proc that tell about the host's kernel, keys or timing; those that exist
# are covered (what container runtimes mask, and kallsyms and config.gz). All of /proc is read-only.
_PROC_MASKED_FILES = (
    "keys", "kallsyms", "config.gz", "interrupts", "kcore", "timer_list", "timer_stats",
    "sched_debug", "latency_stats", "kpagecount", "kpageflags",
)  # fmt: skip
_PROC_MASKED_DIRS = ("acpi", "asound", "scsi")


class StepError(Exception):
    """A set-up step failed; carries the step's name and the errno."""

    def __init__(self, step: str, error: OSError) -> None:
        self.step, self.errno = step, error.errno or 0
        super().__init__(f"{step}: {error}")


class RootSpec:
    """What the root shows; comes from the agent's settings."""

    def __init__(
        self,
        visible: list[str],
        etc: list[str],
        extra_ro: list[str],
        hidden: list[str],
        devices: list[str],
        keep_proc: bool,
    ) -> None:
        self.keep_proc = keep_proc
        self.visible, self.etc, self.extra_ro = visible, etc, extra_ro
        self.hidden, self.devices = hidden, devices


class _Source:
    """One host path, opened before the staging tmpfs may cover where it lies."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.link = os.readlink(path) if os.path.islink(path) else ""
        self.is_dir = os.path.isdir(path)
        self.tree = -1
        if not self.link:
            self.tree = kernel.open_tree(
                kernel.AT_FDCWD, path, kernel.OPEN_TREE_CLONE | kernel.AT_RECURSIVE
            )

    def place(self, root: str) -> None:
        """Show it at the same path below ``root``, read-only; a symlink is copied as such."""
        target = root + self.path
        if self.link:
            _make_directory(os.path.dirname(target))
            os.symlink(self.link, target)
            return
        if self.is_dir:
            _make_directory(target)
        else:
            _touch(target)
        attributes = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
        every = kernel.AT_EMPTY_PATH | kernel.AT_RECURSIVE
        kernel.mount_setattr(self.tree, "", every, attributes)
        kernel.move_mount(self.tree, target)
        os.close(self.tree)


def build(spec: RootSpec, passwd: str, group: str, program: bytes) -> int:
    """Build the root and pivot into it. The mount namespace must already be private to us.

    Returns a descriptor of ``program``, an executable file that has no name in the root.
    """
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    root = STAGING
    assemble(spec, root, passwd, group)
    _make_directory(f"{root}/old-root")
    program_fd = _nameless(f"{root}/program", program)
    make_dev(f"{root}/dev", "/dev", list(DEVICE_NODES))
    _stage_devices(root, spec.devices)
    # Kept so that a new proc may be mounted from a user namespace (the kernel wants to see one that
    # is wholly visible, mount_namespaces(7)); every job replaces it by its own.
    if spec.keep_proc:
        kernel.mount("/proc", f"{root}/proc", "", kernel.MS_BIND | kernel.MS_REC)
    os.chdir(root)
    kernel.pivot_root(".", "old-root")
    os.chdir("/")
    kernel.umount("/old-root")
    os.rmdir("/old-root")
    # Without root the job's uid owns these filesystems: only read-only mounts keep it from writing.
    kernel.mount_setattr(kernel.AT_FDCWD, "/", kernel.AT_RECURSIVE, kernel.MOUNT_ATTR_RDONLY)
    return program_fd


def _nameless(path: str, content: bytes) -> int:
    """An executable file, already without its name. Not a memfd: kernels may forbid to run those
    (``vm.memfd_noexec``)."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o500)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)  # nobody may have it open for writing when it is run
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.unlink(path)
    return fd


def assemble(spec: RootSpec, root: str, passwd: str, group: str) -> None:
    """Mount at ``root`` what the jobs shall see of the host, with places for what each job adds."""
    sources = [_Source(path) for path in spec.visible if os.path.lexists(path)]
    etc_dirs = [f"/etc/{name}" for name in spec.etc if os.path.isdir(f"/etc/{name}")]
    sources += [_Source(path) for path in etc_dirs]
    sources += [_Source(path) for path in spec.extra_ro]  # a missing one is an error
    tmpfs_flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("outrider", root, "tmpfs", tmpfs_flags, _ROOT_TMPFS)
    for source in sources:
        source.place(root)
    _etc(root, spec.etc, passwd, group)
    for path in spec.hidden:
        _hide(root + path)
    for name in ("proc", "work", "tmp", "dev"):
        _make_directory(f"{root}/{name}")


def _make_directory(path: str) -> None:
    os.makedirs(path, mode=0o755, exist_ok=True)


def _touch(path: str) -> None:
    _make_directory(os.path.dirname(path))
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))


def _etc(root: str, names: list[str], passwd: str, group: str) -> None:
    """Only what programs need to start: small files copied, links kept (directories are bound)."""
    _make_directory(f"{root}/etc")
    for name in names:
        source, target = f"/etc/{name}", f"{root}/etc/{name}"
        if os.path.islink(source):
            _make_directory(os.path.dirname(target))
            os.symlink(os.readlink(source), target)
        elif os.path.isfile(source) and os.path.getsize(source) <= _ETC_COPY_BYTES_MAX:
            with open(source, "rb") as file:
                _write_file(target, file.read())
    _write_file(f"{root}/etc/passwd", passwd.encode())
    _write_file(f"{root}/etc/group", group.encode())
    _write_file(f"{root}/etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n")


def _write_file(path: str, data: bytes) -> None:
    _make_directory(os.path.dirname(path))
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o444)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _hide(path: str) -> None:
    """Cover a path inside a visible one: an empty directory, or the null device on a file."""
    if os.path.isdir(path):
        read_only = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("hidden", path, "tmpfs", read_only, "size=4k,nr_inodes=2,mode=555")
    elif os.path.exists(path):
        kernel.mount("/dev/null", path, "", kernel.MS_BIND)


def make_dev(target: str, source: str, names: list[str]) -> None:
    """A minimal /dev: binds of the few nodes, the usual links, a place for shm.

    A node is bound from ``source`` only if it is a character device and no symlink there
    (CVE-2025-31133: /dev/null swapped for a link got a host file mounted writable).
    """
    kernel.mount("dev", target, "tmpfs", DEV_FLAGS, DEV_OPTIONS)
    for name in names:
        bind_device(f"{source}/{name}", f"{target}/{name}")
    for name, link in DEVICE_LINKS.items():
        os.symlink(link, f"{target}/{name}")
    _make_directory(f"{target}/shm")


def bind_device(source: str, target: str) -> None:
    """Bind one character device, checked through the descriptor that is then mounted."""
    flags = kernel.OPEN_TREE_CLONE | kernel.AT_SYMLINK_NOFOLLOW
    tree = kernel.open_tree(kernel.AT_FDCWD, source, flags)
    try:
        if not stat.S_ISCHR(os.stat(tree).st_mode):
            raise OSError(errno.ENODEV, f"{source} is not a character device")
        _touch(target)
        kernel.mount_setattr(
            tree, "", kernel.AT_EMPTY_PATH, kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NOEXEC
        )
        kernel.move_mount(tree, target)
    finally:
        os.close(tree)


def _stage_devices(root: str, devices: list[str]) -> None:
    """Configured device nodes (GPUs), kept where only the set-up of a job sees them."""
    if not devices:
        return
    _make_directory(root + DEVICES)
    kernel.mount("devices", root + DEVICES, "tmpfs", kernel.MS_NOSUID, "size=64k,mode=700")
    for path in (*(f"/dev/{name}" for name in DEVICE_NODES), *devices):
        bind_device(path, root + DEVICES + "/" + os.path.relpath(path, "/dev"))


def masked_paths() -> tuple[list[str], list[str]]:
    """Files and directories of /proc to cover in every job: those that exist on this host."""
    files = [f"/proc/{name}" for name in _PROC_MASKED_FILES if _exposed(f"/proc/{name}", 0o004)]
    dirs = [f"/proc/{name}" for name in _PROC_MASKED_DIRS if _exposed(f"/proc/{name}", 0o005)]
    return files, dirs


def _exposed(path: str, bits: int) -> bool:
    """Others may read it: jobs are never the host's root, so closed files need no cover."""
    return os.path.exists(path) and bool(os.stat(path).st_mode & bits)
