# ruff: noqa: PTH116
# pathlib would add a third to the launcher's memory.
"""Which devices the tasks of a cgroup may open: an eBPF program on v2, lists on v1.

The second wall behind a /dev that shows only what a job was given: even a node that should not
exist opens nothing. Programs are written out instruction by instruction; there is no compiler here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from node_agent.launcher import kernel

Numbers = tuple[int, int]  # major, minor

_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_DEVICE, _ATTACH_TYPE_CGROUP_DEVICE, _ALLOW_MULTI = 15, 6, 2
_TYPE_CHAR, _ACCESS_MKNOD = 2, 1
_LOAD_WORD, _MOVE, _AND, _SHIFT_RIGHT = 0x61, 0xB7, 0x57, 0x77
_JUMP_EQUAL, _JUMP_NOT_EQUAL, _JUMP_ANY_BIT, _EXIT = 0x15, 0x55, 0x45, 0x95
# bpf(2): devices are a fact of policy, not a secret; the helpers used need no GPL licence.
_LICENSE = b"Apache-2.0\0"


def _insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    return bytes((code, src << 4 | dst)) + off.to_bytes(2, "little") + imm.to_bytes(4, "little")


def program(allowed: list[Numbers]) -> bytes:
    """Allow opening the listed character devices; refuse all else and every mknod.

    Context (struct bpf_cgroup_dev_ctx): type in the low and access in the high half of word 0,
    then major, then minor.
    """
    deny = _insn(_MOVE, 0, imm=0) + _insn(_EXIT)
    body = [
        _insn(_LOAD_WORD, 2, 1, 0),
        _insn(_LOAD_WORD, 3, 1, 0),
        _insn(_SHIFT_RIGHT, 3, imm=16),
        _insn(_JUMP_ANY_BIT, 3, off=2, imm=_ACCESS_MKNOD),
        _insn(_AND, 2, imm=0xFFFF),
        _insn(_JUMP_EQUAL, 2, off=2, imm=_TYPE_CHAR),
        deny,  # two instructions: where the jump for mknod lands, too
        _insn(_LOAD_WORD, 4, 1, 4),
        _insn(_LOAD_WORD, 5, 1, 8),
    ]
    for major, minor in allowed:
        body += [
            _insn(_JUMP_NOT_EQUAL, 4, off=3, imm=major),
            _insn(_JUMP_NOT_EQUAL, 5, off=2, imm=minor),
            _insn(_MOVE, 0, imm=1),
            _insn(_EXIT),
        ]
    return b"".join(body) + deny


def load(allowed: list[Numbers]) -> int:
    """Load the program; returns its descriptor. Needs CAP_BPF or CAP_SYS_ADMIN."""
    code = program(allowed)
    insns = ctypes.create_string_buffer(code, len(code))
    license_text = ctypes.create_string_buffer(_LICENSE)
    attributes = b"".join(
        (
            _PROG_TYPE_CGROUP_DEVICE.to_bytes(4, "little"),
            (len(code) // 8).to_bytes(4, "little"),
            ctypes.addressof(insns).to_bytes(8, "little"),
            ctypes.addressof(license_text).to_bytes(8, "little"),
            bytes(4 + 4 + 8 + 4 + 4),
        )
    )
    return kernel.bpf(_PROG_LOAD, attributes)


def attach(cgroup_fd: int, program_fd: int) -> None:
    """Attach to a v2 cgroup; programs of ancestors stay in force (all must allow)."""
    words = (cgroup_fd, program_fd, _ATTACH_TYPE_CGROUP_DEVICE, _ALLOW_MULTI)
    kernel.bpf(_PROG_ATTACH, b"".join(word.to_bytes(4, "little") for word in words))


def numbers(path: str) -> Numbers:
    """Device numbers of a character device."""
    facts = os.stat(path)
    if not stat.S_ISCHR(facts.st_mode):
        raise OSError(errno.ENODEV, f"{path} is not a character device")
    return os.major(facts.st_rdev), os.minor(facts.st_rdev)
