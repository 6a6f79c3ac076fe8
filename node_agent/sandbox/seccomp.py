"""The seccomp filter of every job: a policy table and a compiler to classic BPF.

Pure: builds bytes, installs nothing. The policy follows what container runtimes allow by default
(an allow-list), less what lets one process look into another or hand out kernel surface that jobs
do not need. A call that the table does not know answers ENOSYS, so that libraries fall back as they
would on an older kernel; a known but forbidden one answers EPERM; a foreign architecture is killed.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from node_agent.sandbox.syscall_table import AARCH64, X86_64

# --- the machine: seccomp_data offsets and classic BPF opcodes (linux/seccomp.h, linux/filter.h)
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16
_LD_W_ABS, _JMP_JA, _JMP_JEQ, _JMP_JGE, _JMP_JSET = 0x20, 0x05, 0x15, 0x35, 0x45
_ALU_AND, _RET = 0x54, 0x06
_JUMP_MAX = 255  # conditional jumps carry 8-bit offsets
_FILTER_INSNS_MAX = 4096  # BPF_MAXINSNS

RET_KILL_PROCESS = 0x80000000
RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000
X32_SYSCALL_BIT = 0x40000000


class AuditArch(IntEnum):
    """AUDIT_ARCH_* of linux/audit.h."""

    X86_64 = 0xC000003E
    AARCH64 = 0xC00000B7


class Insn(NamedTuple):
    """One ``struct sock_filter``."""

    code: int
    jump_true: int
    jump_false: int
    k: int


Program = list[Insn]


def ret_errno(number: int) -> int:
    """The filter's answer that makes a call fail with ``number``."""
    return _RET_ERRNO | number


_EPERM = ret_errno(errno.EPERM)
_ENOSYS = ret_errno(errno.ENOSYS)

# --- the policy -------------------------------------------------------------------------------
# Known and refused. Grouped by why; each group is an attack in tests/attacks.
_DENIED = """
    unshare setns
    mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick open_tree open_tree_attr
    move_mount mount_setattr statmount listmount
    io_uring_setup io_uring_enter io_uring_register userfaultfd bpf perf_event_open
    add_key request_key keyctl
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd
    name_to_handle_at open_by_handle_at fanotify_init fanotify_mark lookup_dcookie
    kexec_load kexec_file_load init_module finit_module delete_module create_module query_module
    get_kernel_syms reboot swapon swapoff iopl ioperm syslog acct quotactl quotactl_fd nfsservctl
    settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname vhangup
    mbind set_mempolicy set_mempolicy_home_node get_mempolicy migrate_pages move_pages
    _sysctl uselib ustat sysfs vserver afs_syscall getpmsg putpmsg security tuxcall
    epoll_ctl_old epoll_wait_old modify_ldt remap_file_pages lsm_set_self_attr
    """
# Reported as absent: libc then falls back to clone(2), whose flags a filter can read.
_ABSENT = "clone3 memfd_secret"

# clone(2) flags that make namespaces (CLONE_NEWTIME cannot be given to clone).
_NAMESPACE_FLAGS = 0x7E020000
_CLONE_NEWTIME = 0x80
_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
# Execution domains as queried or set by ordinary programs: PER_LINUX, UNAME26, and the query.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_IOCTLS_DENIED = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: input into someone's terminal
_S_IFMT, _S_IFCHR, _S_IFBLK = 0o170000, 0o020000, 0o060000


def _load_arg(index: int, *, high: bool = False) -> Insn:
    return Insn(_LD_W_ABS, 0, 0, _OFFSET_ARGS + 8 * index + (4 if high else 0))


def _ret(action: int) -> Insn:
    return Insn(_RET, 0, 0, action)


def _one_of(
    index: int, values: tuple[int, ...], mask: int | None = None, *, allow: bool
) -> Program:
    """Allow (or refuse) exactly the listed low words of an argument."""
    hit, miss = (RET_ALLOW, _EPERM) if allow else (_EPERM, RET_ALLOW)
    body = [_load_arg(index)]
    if mask is not None:
        body.append(Insn(_ALU_AND, 0, 0, mask))
    for position, value in enumerate(values):
        body.append(Insn(_JMP_JEQ, len(values) - position, 0, value))
    return [*body, _ret(miss), _ret(hit)]


def _clone() -> Program:
    return [_load_arg(0), Insn(_JMP_JSET, 0, 1, _NAMESPACE_FLAGS), _ret(_EPERM), _ret(RET_ALLOW)]


def _device_nodes(mode_index: int) -> Callable[[], Program]:
    return lambda: _one_of(mode_index, (_S_IFCHR, _S_IFBLK), _S_IFMT, allow=False)


_ARGUMENT_RULES: dict[str, Callable[[], Program]] = {
    "clone": _clone,
    "socket": lambda: _one_of(0, _SOCKET_FAMILIES, allow=True),
    "socketpair": lambda: _one_of(0, _SOCKET_FAMILIES, allow=True),
    "personality": lambda: _one_of(0, _PERSONALITIES, allow=True),
    "ioctl": lambda: _one_of(1, _IOCTLS_DENIED, allow=False),
    "mknod": _device_nodes(1),
    "mknodat": _device_nodes(2),
}


class _Rule(NamedTuple):
    action: int | None  # None: arguments decide
    name: str


def _rule(name: str, denied: frozenset[str], absent: frozenset[str]) -> _Rule:
    if name in _ARGUMENT_RULES:
        return _Rule(None, name)
    if name in absent:
        return _Rule(_ENOSYS, "")
    return _Rule(_EPERM if name in denied else RET_ALLOW, "")


def _spans(table: dict[str, int]) -> list[tuple[int, _Rule]]:
    """(first number, rule) in rising order; each holds up to the next one's first number."""
    denied, absent = frozenset(_DENIED.split()), frozenset(_ABSENT.split())
    names = {number: name for name, number in table.items()}
    unknown = _Rule(_ENOSYS, "")
    spans: list[tuple[int, _Rule]] = []
    for number in range(max(names) + 2):
        rule = _rule(names[number], denied, absent) if number in names else unknown
        if not spans or spans[-1][1] != rule:
            spans.append((number, rule))
    return spans


def _tree(spans: list[tuple[int, _Rule]]) -> Program:
    """Binary search over the spans: installing costs the kernel one run per call number."""
    if len(spans) == 1:
        rule = spans[0][1]
        return [_ret(rule.action)] if rule.action is not None else _ARGUMENT_RULES[rule.name]()
    middle = len(spans) // 2
    left, right = _tree(spans[:middle]), _tree(spans[middle:])
    pivot = spans[middle][0]
    if len(left) <= _JUMP_MAX:
        return [Insn(_JMP_JGE, len(left), 0, pivot), *left, *right]
    return [Insn(_JMP_JGE, 0, 1, pivot), Insn(_JMP_JA, 0, 0, len(left)), *left, *right]


def build_filter(machine: str) -> Program:
    """The filter for ``machine`` (as ``os.uname().machine`` names it)."""
    if machine == "x86_64":
        arch, table = AuditArch.X86_64, X86_64
    elif machine == "aarch64":
        arch, table = AuditArch.AARCH64, AARCH64
    else:
        raise ValueError(f"no system call table for machine {machine!r}; supported: {MACHINES}")
    program = [
        Insn(_LD_W_ABS, 0, 0, _OFFSET_ARCH),
        Insn(_JMP_JEQ, 1, 0, arch),
        _ret(RET_KILL_PROCESS),
        Insn(_LD_W_ABS, 0, 0, _OFFSET_NR),
    ]
    if arch is AuditArch.X86_64:
        # x32 shares the x86_64 audit arch; only this bit tells it apart (seccomp(2), NOTES). The
        # number -1 is what a tracer leaves behind; both are refused the same way.
        program += [Insn(_JMP_JSET, 0, 1, X32_SYSCALL_BIT), _ret(RET_KILL_PROCESS)]
    program += _tree(_spans(table))
    if len(program) > _FILTER_INSNS_MAX:
        raise AssertionError(f"seccomp filter has {len(program)} instructions")
    return program


MACHINES = ("x86_64", "aarch64")


def encode(program: Program) -> bytes:
    """As the kernel reads it: an array of ``struct sock_filter`` in host byte order."""
    return b"".join(struct.pack("=HBBI", *insn) for insn in program)


def known_syscalls(machine: str) -> dict[str, int]:
    """Name to number, for tests and tools."""
    return dict({"x86_64": X86_64, "aarch64": AARCH64}[machine])


# --- the same policy for a runtime ------------------------------------------------------------
OciRule = dict[str, object]
_LOW_WORD = 0xFFFFFFFF
# What libseccomp's rules can say: equal under a mask. A rule per value that is refused by name; all
# that no rule speaks of gets the profile's default, ENOSYS.
_FAMILIES_REFUSED = tuple(n for n in range(64) if n not in _SOCKET_FAMILIES)
_PERSONALITY_FLAGS = tuple(1 << bit for bit in range(18, 28))  # ADDR_NO_RANDOMIZE and its like
_NODES_ALLOWED = (0, 0o010000, 0o100000, 0o140000)  # as S_IFREG; FIFO, regular, socket


def oci_profile(machine: str) -> dict[str, object]:
    """`linux.seccomp` of an OCI ``config.json`` with this policy, as far as it can be said there.

    Unlike ``build_filter``: all of `ioctl` is allowed (a job has no terminal to push input into),
    and a domain of `personality` or a socket family that nobody knows answers ENOSYS, not EPERM.
    """
    table = known_syscalls(machine)
    denied, absent = frozenset(_DENIED.split()), frozenset(_ABSENT.split())
    allowed = table.keys() - denied - absent - (_ARGUMENT_RULES.keys() - {"ioctl"})
    rules: list[OciRule] = [
        {"names": sorted(allowed), "action": "SCMP_ACT_ALLOW"},
        {"names": sorted(denied & table.keys()), **_REFUSE},
    ]
    rules.append(_masked("clone", 0, _NAMESPACE_FLAGS, 0, allow=True))
    bits = [1 << n for n in range(32) if _NAMESPACE_FLAGS >> n & 1]
    rules += [_masked("clone", 0, bit, bit, allow=False) for bit in bits]
    for name in ("socket", "socketpair"):
        rules += [_masked(name, 0, _LOW_WORD, n, allow=True) for n in _SOCKET_FAMILIES]
        rules += [_masked(name, 0, _LOW_WORD, n, allow=False) for n in _FAMILIES_REFUSED]
    rules += [_masked("personality", 0, _LOW_WORD, n, allow=True) for n in _PERSONALITIES]
    rules += [_masked("personality", 0, _LOW_WORD, n, allow=False) for n in _PERSONALITY_FLAGS]
    for name, index in (("mknod", 1), ("mknodat", 2)):
        if name in table:
            rules += [_masked(name, index, _S_IFMT, n, allow=True) for n in _NODES_ALLOWED]
            kinds = (_S_IFCHR, _S_IFBLK)
            rules += [_masked(name, index, _S_IFMT, n, allow=False) for n in kinds]
    architecture = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}[machine]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [architecture],
        "syscalls": rules,
    }


_REFUSE: OciRule = {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}


def _masked(name: str, index: int, mask: int, value: int, *, allow: bool) -> OciRule:
    what: OciRule = {"action": "SCMP_ACT_ALLOW"} if allow else _REFUSE
    test = {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
    return {"names": [name], **what, "args": [test]}
