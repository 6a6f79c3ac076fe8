"""System calls that Python 3.11 does not wrap, as thin functions that raise ``OSError``.

Raw ``syscall(2)`` through ctypes: after a raw ``clone3`` glibc's idea of the thread is stale, so
the code that runs between clone and exec goes through these and through ``os`` only.
"""

from __future__ import annotations

import ctypes
import os
import time
from ctypes import c_long, c_ulong, c_void_p

_MACHINE = os.uname().machine

# Numbers from the kernel's syscall tables: x86_64 and aarch64 (-1: not there).
_NUMBERS = {
    "bpf": (321, 280), "capset": (126, 91), "chdir": (80, 49), "clone": (56, 220),
    "close": (3, 57), "dup3": (292, 24), "execve": (59, 221), "exit_group": (231, 94),
    "fchmod": (91, 52), "fchmodat": (268, 53), "getrusage": (98, 165), "kill": (62, 129),
    "mkdirat": (258, 34),
    "mount": (165, 40), "openat": (257, 56), "pivot_root": (155, 41), "prctl": (157, 167),
    "prlimit64": (302, 261), "recvmsg": (47, 212), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigtimedwait": (128, 137), "sched_setaffinity": (203, 122),
    "seccomp": (317, 277), "sendfile": (40, 71), "sendmsg": (46, 211), "sendto": (44, 206),
    "set_mempolicy": (238, 237), "setgroups": (116, 159), "sethostname": (170, 161),
    "setns": (308, 268), "setresgid": (119, 149), "setresuid": (117, 147), "setsid": (112, 157),
    "signalfd4": (289, 74), "symlinkat": (266, 36), "umask": (95, 166), "umount2": (166, 39),
    "unshare": (272, 97), "wait4": (61, 260), "write": (1, 64),
    # From 424 on the same everywhere.
    "pidfd_send_signal": (424, 424), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "clone3": (435, 435),
    "close_range": (436, 436), "openat2": (437, 437), "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444), "landlock_restrict_self": (446, 446),
}  # fmt: skip
MACHINES = ("x86_64", "aarch64")
SUPPORTED = _MACHINE in MACHINES
CALLS: dict[str, int] = {
    name: numbers[MACHINES.index(_MACHINE)] if SUPPORTED else -1
    for name, numbers in _NUMBERS.items()
}
"""Numbers of system calls on this machine."""

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PIDFD = 0x00001000
CLONE_INTO_CGROUP = 0x200000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
OPEN_TREE_CLONE = 1
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
MOVE_MOUNT_F_EMPTY_PATH = 4

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08
RESOLVE_IN_ROOT = 0x10

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
# NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE and the lock of each, and of KEEP_CAPS
# (capabilities(7)).
SECUREBITS_LOCKED = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40 | 0x80

CAP_SETPCAP = 8
CAP_SYS_ADMIN = 21
CAP_SETFCAP = 31

SECCOMP_SET_MODE_FILTER = 1
LANDLOCK_CREATE_RULESET_VERSION = 1
# Landlock ABI 6: abstract unix sockets and signals stay inside the domain.
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL = 1, 2
LANDLOCK_ABI_SCOPED = 6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (c_long,) + (c_void_p,) * 6
_libc.syscall.restype = c_long
_libc.prctl.argtypes = (ctypes.c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *args: int | bytes | None) -> int:
    padded = (*args, 0, 0, 0, 0, 0, 0)[:6]
    return _check(int(_libc.syscall(number, *padded)), what)


def _words(*values: int) -> bytes:
    return b"".join((value & (2**64 - 1)).to_bytes(8, "little") for value in values)


def clone3(flags: int, pidfd: ctypes.c_int | None = None, cgroup_fd: int | None = None) -> int:
    """Fork with namespaces; 0 in the child. clone3(2), struct clone_args VER2 (88 bytes)."""
    pidfd_address = 0
    if pidfd is not None:
        flags |= CLONE_PIDFD
        pidfd_address = ctypes.addressof(pidfd)
    if cgroup_fd is not None:
        flags |= CLONE_INTO_CGROUP
    sigchld = 17
    args = _words(flags, pidfd_address, 0, 0, sigchld, 0, 0, 0, 0, 0, cgroup_fd or 0)
    return _syscall("clone3", CALLS["clone3"], args, len(args))


def fork_raw() -> int:
    """Plain fork without libc's fork handlers (see trap: stale TID cache after raw clone3)."""
    return _syscall("clone", CALLS["clone"], 17)


def pidfd_send_signal(pidfd: int, signal_number: int) -> None:
    """Signal a process that cannot be confused with a later one of its number."""
    _syscall("pidfd_send_signal", CALLS["pidfd_send_signal"], pidfd, signal_number, None, 0)


def signalfd(signal_number: int) -> int:
    """A descriptor that is readable once the (blocked) signal was sent to us; signalfd(2)."""
    mask = _words(1 << (signal_number - 1))
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # SFD_CLOEXEC and SFD_NONBLOCK are these
    return _syscall("signalfd", CALLS["signalfd4"], -1, mask, len(mask), flags)


def set_mempolicy_bind(nodes: tuple[int, ...]) -> None:
    """Memory from these NUMA nodes only, also after fork and exec; set_mempolicy(2), MPOL_BIND."""
    mode_bind, bits = 2, 64 * (max(nodes) // 64 + 1)
    mask = sum(1 << node for node in set(nodes)).to_bytes(bits // 8, "little")
    _syscall("set_mempolicy", CALLS["set_mempolicy"], mode_bind, mask, bits + 1)


def unshare(flags: int) -> None:
    """Leave namespaces; unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def syncfs(fd: int) -> None:
    """Write the whole file system of an open file to its disk; syncfs(2)."""
    _check(_libc.syncfs(fd), "syncfs")


def setns(fd: int, kind: int) -> None:
    """Enter a namespace by descriptor; setns(2)."""
    _syscall("setns", CALLS["setns"], fd, kind)


def close_from(first: int) -> None:
    """Close ``first`` and every descriptor above; close_range(2)."""
    _syscall("close_range", CALLS["close_range"], first, 2**32 - 1, 0)


def close_all_but(keep: tuple[int, ...]) -> None:
    """Close every descriptor from 3 up except ``keep``."""
    first = 3
    for fd in sorted(set(keep)):
        if fd > first:
            _syscall("close_range", CALLS["close_range"], first, fd - 1, 0)
        first = max(first, fd + 1)
    close_from(first)


def boot_ms() -> int:
    """CLOCK_BOOTTIME: goes on while the host is suspended, the same for every process of it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def prctl(option: int, *args: int) -> int:
    """One prctl(2) call."""
    padded = (*args, 0, 0, 0, 0)[:4]
    return _check(int(_libc.prctl(option, *padded)), f"prctl({option})")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Classic mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode() or None
        ),
        f"mount {kind or 'bind'} on {target}",
    )


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2), lazily unless told otherwise."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """Swap the root of this mount namespace; pivot_root(2)."""
    _syscall("pivot_root", CALLS["pivot_root"], new_root.encode() + b"\0", put_old.encode() + b"\0")


def open_tree(dir_fd: int, path: str, flags: int) -> int:
    """Detached copy of a mount (``OPEN_TREE_CLONE``), as a descriptor; open_tree(2)."""
    name = os.fsencode(path) + b"\0"
    return _syscall("open_tree", CALLS["open_tree"], dir_fd, name, flags | os.O_CLOEXEC)


def mount_setattr(fd: int, path: str, flags: int, attr_set: int) -> None:
    """Add mount attributes; mount_setattr(2)."""
    args = _words(attr_set, 0, 0, 0)
    _syscall(
        f"mount_setattr {path}",
        CALLS["mount_setattr"],
        fd,
        path.encode() + b"\0",
        flags,
        args,
        len(args),
    )


def move_mount(from_fd: int, target: str) -> None:
    """Attach a detached mount at ``target``; move_mount(2)."""
    _syscall(
        f"move_mount to {target}",
        CALLS["move_mount"],
        from_fd,
        b"\0",
        AT_FDCWD,
        os.fsencode(target) + b"\0",
        MOVE_MOUNT_F_EMPTY_PATH,
    )


def mount_detached(kind: str, attr: int) -> int:
    """A new filesystem that is mounted nowhere yet, as a descriptor; fsopen(2), fsmount(2)."""
    cloexec, fsconfig_create = 1, 6
    context = _syscall(f"fsopen {kind}", CALLS["fsopen"], kind.encode() + b"\0", cloexec)
    try:
        _syscall(f"fsconfig {kind}", CALLS["fsconfig"], context, fsconfig_create, None, None, 0)
        return _syscall(f"fsmount {kind}", CALLS["fsmount"], context, cloexec, attr)
    finally:
        os.close(context)


def openat2(dir_fd: int, path: str | bytes, flags: int, resolve: int) -> int:
    """Open below ``dir_fd`` under ``resolve`` restrictions; openat2(2)."""
    how = _words(flags | os.O_CLOEXEC, 0, resolve)
    return _syscall("openat2", CALLS["openat2"], dir_fd, os.fsencode(path) + b"\0", how, len(how))


def capset(effective: int, permitted: int | None = None, inheritable: int = 0) -> None:
    """Set effective, permitted (if not said, the same) and inheritable capabilities; capset(2),
    version 3."""
    allowed = effective if permitted is None else permitted
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    low, high = 2**32 - 1, 32
    data = b"".join(
        (value >> half & low).to_bytes(4, "little")
        for half in (0, high)
        for value in (effective, allowed, inheritable)
    )
    _syscall("capset", CALLS["capset"], header, data)


def keep_capabilities(last_cap: int) -> None:
    """All of them, beyond an exec that does not begin as root: capabilities(7), ambient."""
    every = (1 << (last_cap + 1)) - 1
    capset(every, every, every)
    for cap in range(last_cap + 1):
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap)


def bounding_set_drop(last_cap: int) -> None:
    """Drop every capability from the bounding set; capabilities(7)."""
    drop = _libc.prctl  # 41 calls for every job
    for cap in range(last_cap + 1):
        if drop(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0:
            _check(-1, f"prctl(PR_CAPBSET_DROP, {cap})")


def seccomp_install(program: bytes) -> None:
    """Install a classic BPF program (``struct sock_fprog``: count, pointer); seccomp(2)."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = _words(len(program) // 8, ctypes.addressof(code))
    _syscall("seccomp", CALLS["seccomp"], SECCOMP_SET_MODE_FILTER, 0, fprog)


def landlock_abi() -> int:
    """Version of Landlock in this kernel, 0 without."""
    try:
        return _syscall(
            "landlock", CALLS["landlock_create_ruleset"], None, 0, LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0  # not built in, or not enabled at boot


def landlock_scope_ruleset() -> int:
    """A ruleset that handles no files, only scopes abstract sockets and signals; landlock(7)."""
    attributes = _words(0, 0, LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL)
    return _syscall(
        "landlock_create_ruleset", CALLS["landlock_create_ruleset"], attributes, len(attributes), 0
    )


def landlock_restrict(ruleset_fd: int) -> None:
    """Enter the ruleset for good; landlock_restrict_self(2)."""
    _syscall("landlock_restrict_self", CALLS["landlock_restrict_self"], ruleset_fd, 0)


def bpf(command: int, attributes: bytes) -> int:
    """One raw bpf(2) call."""
    return _syscall("bpf", CALLS["bpf"], command, attributes, len(attributes))
