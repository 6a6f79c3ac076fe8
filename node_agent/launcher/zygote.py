"""The process that every init is forked from: the loop of ``interpreter.py`` and its memory, a few
pages in all.

The launcher is a Python process of some megabytes. A fork of it copies its page tables, and then
both sides copy every page that either writes to: more than all that init does. So the launcher asks
its zygote (a static program that it writes itself) to fork::

    launcher ── first list, descriptors ──▶ zygote ── clone3(CLONE_PARENT) ──▶ init
             ◀── pid, pidfd ──────────────

CLONE_PARENT makes init the launcher's own child: it is waited for, and dies with it, as if there
were no zygote. No list of a job ever passes through the zygote, so an init's memory, which is a
copy of the zygote's, holds nothing of other jobs.

The self-test of a sandbox is Python. For it alone a fork of the launcher takes the zygote's part,
and its own Python goes on where the list says LEAVE.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from _socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    MSG_NOSIGNAL,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    socket,
    socketpair,
)

from node_agent.launcher import kernel, probe, rights
from node_agent.launcher.board import CONTROL, GIVEN, LANDLOCK, NET, SET_UP_BYTES_MAX, Board
from node_agent.launcher.child import Shape, Shared
from node_agent.launcher.init import Given, first_list
from node_agent.launcher.interpreter import (
    DATA_BASE,
    LEAVE,
    executable,
    run_here,
)
from node_agent.launcher.program import Program
from node_agent.launcher.signals import signal

TYPE_CHECKING = False  # collections is another import
if TYPE_CHECKING:
    from collections.abc import Callable

BOARD = Board(DATA_BASE)
_NAME = "outrider-init"
_PR_SET_NAME = 15
_LOOP_BYTES_MAX = 2048
# First lists kept for the next sandbox of their kind; each takes some 20 KiB.
_LISTS_MAX = 64
# Above the numbers that the zygote gives its descriptors.
_OUT_OF_THE_WAY = 64
_FDS_MAX = 12


def program() -> bytes:
    """The zygote as an executable. Raises OSError on a machine that it is not written for."""
    machine = os.uname().machine
    image = BOARD.image(_loop())
    return executable(machine, BOARD.loop, BOARD.fault, image, Board.BYTES)


def _loop() -> bytes:
    """Take a list, fork, answer with what clone3 returned, begin again."""
    to = Program(BOARD.loop, BOARD.sink, GIVEN)
    to.call("prctl", _PR_SET_NAME, _NAME, if_error="gone")
    to.label("next")
    to.label("list", BOARD.set_up)
    to.load(BOARD.room, store=BOARD.request_room)
    to.call("recvmsg", CONTROL, BOARD.request, MSG_CMSG_CLOEXEC, expected=0, if_equal="gone",
            if_error="gone", otherwise="list")  # fmt: skip
    to.label("born")
    to.load(BOARD.pidfd, store=BOARD.answered_fd)
    to.call("sendmsg", CONTROL, BOARD.answer, MSG_NOSIGNAL, if_error="gone", otherwise="clear")
    to.label("stillborn")
    to.call("sendto", CONTROL, BOARD.pid, 8, MSG_NOSIGNAL, if_error="gone")
    to.label("clear")
    to.call("close_range", GIVEN, 2**32 - 1, 0, if_error="gone", otherwise="next")
    to.label("gone")
    to.label("failed")
    to.call("exit_group", 0)
    BOARD.born, BOARD.stillborn = to.labelled("born", 0), to.labelled("stillborn", 0)
    return to.finish(_LOOP_BYTES_MAX)


class Inits:
    """Starts inits, by the zygote."""

    def __init__(self, shared: Shared, program_fd: int) -> None:
        """Takes ``program_fd``, the executable. Raises OSError."""
        self._shared, self._program_fd = shared, program_fd
        self._lists: dict[tuple[object, ...], tuple[Program, bytes]] = {}
        self._zygote, self._pid = self._spawn(self._become)

    def start(
        self, shape: Shape, ids: tuple[int, int], control: int, join: list[int], cgroup: int | None
    ) -> tuple[int, int, Program]:
        """(pid, pidfd, its list, to be asked whom to blame). Raises OSError; nothing runs then."""
        image = self._shared.images.namespace(shape.image)
        given = Given(join, cgroup, image)
        first, content = self._list(shape, ids, given)
        fds = [control, *join, *([] if cgroup is None else [cgroup])]
        fds += [image] if image >= 0 else []
        if shape.probe:
            zygote, pid = self._spawn(_serve_once)
            try:
                return *_ask(zygote, content, fds), first
            finally:
                zygote.close()
                os.waitpid(pid, 0)
        try:
            return *_ask(self._zygote, content, fds), first
        except (BrokenPipeError, ConnectionResetError):  # killed: nothing of ours is in it
            self.close()
            self._zygote, self._pid = self._spawn(self._become)
            return *_ask(self._zygote, content, fds), first

    def close(self) -> None:
        """The zygote ends, and is waited for."""
        self._zygote.close()
        os.waitpid(self._pid, 0)

    def _list(self, shape: Shape, ids: tuple[int, int], given: Given) -> tuple[Program, bytes]:
        key = (shape.facts, ids, given.facts)
        found = self._lists.get(key)
        if found is None:
            while len(self._lists) >= _LISTS_MAX:
                del self._lists[next(iter(self._lists))]
            found = self._lists[key] = first_list(self._shared, shape, ids, BOARD, given)
        return found

    def _spawn(self, body: Callable[[int], None]) -> tuple[socket, int]:
        """A child that is told what to do by the socket. Raises OSError."""
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)
        pid = os.fork()
        if pid == 0:
            try:
                kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
                body(self._arrange(theirs.fileno()))
            except OSError as error:
                sys.stderr.write(f"zygote: {error}\n")
            finally:
                os._exit(1)
        theirs.close()
        return ours, pid

    def _arrange(self, control: int) -> int:
        """The descriptors at their numbers, all others closed. That of the program."""
        shared = self._shared
        null = 0  # keeps a number taken
        wanted = {
            CONTROL: control,
            NET: shared.net_fd if shared.net_fd >= 0 else null,
            LANDLOCK: shared.landlock_fd if shared.landlock_fd >= 0 else null,
        }
        away = {number: _away(fd) for number, fd in wanted.items()}
        program_fd = _away(self._program_fd)
        for number, fd in away.items():
            os.dup2(fd, number)
        kernel.close_all_but((*wanted, program_fd))
        return program_fd

    def _become(self, program_fd: int) -> None:
        if os.geteuid():  # in the launcher's own user namespace, where it holds them all
            kernel.keep_capabilities(self._shared.last_cap)
        os.execve(program_fd, [_NAME], os.environ)


def _away(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY)


def _ask(zygote: socket, content: bytes, fds: list[int]) -> tuple[int, int]:
    """pid and pidfd. Raises OSError: what clone3 said; BrokenPipeError: the zygote is gone."""
    zygote.sendmsg([content], rights.beside(fds), MSG_NOSIGNAL)
    data, ancillary, _, _ = zygote.recvmsg(8, rights.room(1), MSG_CMSG_CLOEXEC)
    if len(data) < 8:
        raise BrokenPipeError(errno.EPIPE, "the zygote ended")
    pid = int.from_bytes(data, sys.byteorder, signed=True)
    if pid < 0:
        raise OSError(-pid, f"clone3: {os.strerror(-pid)}")
    taken = rights.taken(ancillary)
    if not taken:
        os.kill(pid, signal.SIGKILL)  # our child, not waited for: nobody else has its number
        os.waitpid(pid, 0)
        raise OSError(errno.EMFILE, "no descriptor is left for a new init")
    return pid, taken[0]


def _serve_once(program_fd: int) -> None:
    """The zygote's part for one sandbox, the self-test's, as this copy of the launcher."""
    answer_to = socket(AF_UNIX, SOCK_SEQPACKET, 0, CONTROL)
    content, ancillary, _, _ = answer_to.recvmsg(SET_UP_BYTES_MAX, rights.room(_FDS_MAX))
    for number, fd in enumerate([_away(fd) for fd in rights.taken(ancillary)], GIVEN):
        os.dup2(fd, number, inheritable=False)
    image = bytearray(BOARD.image(_loop()))
    for record in (BOARD.born, BOARD.stillborn):
        struct.pack_into("<q", image, record - BOARD.base, LEAVE)
    image = image.ljust(BOARD.set_up - BOARD.base, b"\0") + content
    memory = run_here(program_fd, bytes(image), Board.BYTES, BOARD.set_up, BOARD.fault)
    inside = memory.number(BOARD.inside)
    if inside:  # the process of the self-test itself, deep in a sandbox
        os._exit(probe.inside(inside))
    pid = memory.number(BOARD.pid)
    fds = [memory.number(BOARD.pidfd)] if pid > 0 else []
    answer_to.sendmsg([pid.to_bytes(8, sys.byteorder, signed=True)], rights.beside(fds))
    os._exit(0)
