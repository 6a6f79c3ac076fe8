"""Memory that a list of system calls and those around it use, at addresses known beforehand.

The zygote has it at a fixed address in its own small memory; for the self-test, which goes on in
Python, the launcher has one too. What init writes to is in its own copy.
"""

from __future__ import annotations

import struct

from node_agent.launcher.signals import signal

# Letters of init's messages to the launcher; the rest of each is 64-bit words.
READY, STARTED, ENDED, FAILED, NOT_EXECUTED = b"R", b"S", b"E", b"F", b"X"
# Where to look for the job's program: each is a try, and a word of the answer.
CANDIDATES_MAX = 100
MESSAGE_BYTES_MAX = 8 * (CANDIDATES_MAX + 1)
# The job's end: letter, wait status, and the struct rusage (getrusage(2)) up to ru_maxrss.
ENDED_WORDS = 7
# The first list: 14 KiB, and half a KiB for each device.
SET_UP_BYTES_MAX = 1 << 17
# The second list; the agent's plan check keeps commands well below (COMMAND_BYTES_MAX).
COMMAND_BYTES_MAX = 1 << 18
# Descriptors at fixed numbers: init's way to the launcher (in the zygote: the zygote's), the empty
# network namespace, Landlock's ruleset. What is handed over for one sandbox comes after them:
# control socket, cgroup.procs files to join, the cgroup to be born in.
CONTROL, NET, LANDLOCK, GIVEN = 3, 4, 5, 6
# Init's own, once it has closed what was given: a writable /proc, then /work.
WORK = GIVEN + 1

_SCM_RIGHTS, _SOL_SOCKET = 1, 1
_CONTROL_BYTES = 64  # struct cmsghdr with room for 12 descriptors
_LISTS_AT = 4096


class Board:
    """The addresses, from ``base``."""

    BYTES = _LISTS_AT + SET_UP_BYTES_MAX + COMMAND_BYTES_MAX

    def __init__(self, base: int) -> None:
        self.base = base
        self.pid, self.sink, self.inside, self.pidfd = base, base + 8, base + 16, base + 24
        self.started, self.tried = base + 32, base + 40
        self.failed, self.fault, self.room = base + 64, base + 72, base + 88
        self.signals = base + 96
        self.not_executed, self.results = base + 128, base + 136
        self.ready, self.command = base + 1024, base + 1184
        self.request, self.answer = base + 1344, base + 1504
        self.ended, self.status, self.usage = base + 1664, base + 1672, base + 1680
        self.loop = base + 2048
        self.born = self.stillborn = 0  # records of the loop: after clone3
        self.set_up = base + _LISTS_AT
        self.job = self.set_up + SET_UP_BYTES_MAX

    @property
    def answered_fd(self) -> int:
        """Where the answer to the launcher holds its descriptor."""
        return self.answer + _RIGHTS_AT + 16

    @property
    def request_room(self) -> int:
        """msg_controllen of the request: recvmsg(2) leaves there what it received, so each but the
        first would have room for no more descriptors than the one before; ``room`` is all."""
        return self.request + _CONTROLLEN_AT

    def image(self, loop: bytes = b"") -> bytes:
        """What it holds at first, up to the lists. ``loop``: the zygote's own list."""
        image = bytearray(_LISTS_AT)

        def put(address: int, content: bytes) -> None:
            at = address - self.base
            assert at + len(content) <= len(image), "the board is too small"
            image[at : at + len(content)] = content

        for address, letter in (
            (self.started, STARTED), (self.ended, ENDED), (self.failed, FAILED),
            (self.not_executed, NOT_EXECUTED),
        ):  # fmt: skip
            put(address, letter)
        awaited = 1 << (signal.SIGCHLD - 1) | 1 << (signal.SIGTERM - 1)
        put(self.signals, struct.pack("<Q", awaited))
        put(self.ready, _message(self.ready, self.ready + _LETTER_AT, 8, WORK) + READY)
        put(self.command, _message(self.command, self.job, COMMAND_BYTES_MAX, -1))
        put(self.request, _message(self.request, self.set_up, SET_UP_BYTES_MAX, -1))
        put(self.answer, _message(self.answer, self.pid, 8, 0))
        put(self.room, struct.pack("<Q", _CONTROL_BYTES))
        put(self.loop, loop)
        return bytes(image)


_CONTROLLEN_AT, _RIGHTS_AT, _LETTER_AT = 40, 72, 136


def _message(address: int, data: int, size: int, fd: int) -> bytes:
    """A struct msghdr (recvmsg(2)) with its vector and control data behind it: to send ``size``
    bytes and ``fd``, or, with fd -1, to receive as many and some descriptors."""
    rights = struct.pack("<QiiiI", 20, _SOL_SOCKET, _SCM_RIGHTS, max(fd, 0), 0)
    room = len(rights) if fd >= 0 else _CONTROL_BYTES
    header = struct.pack("<QQQQQQQ", 0, 0, address + 56, 1, address + _RIGHTS_AT, room, 0)
    return (header + struct.pack("<QQ", data, size) + rights).ljust(_LETTER_AT, b"\0")
