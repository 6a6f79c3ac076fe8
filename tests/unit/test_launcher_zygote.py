"""The program that every init is forked from, as a process: what it takes and what it answers."""

import errno
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.launcher import kernel, zygote
from node_agent.launcher.board import CONTROL, GIVEN, SET_UP_BYTES_MAX
from node_agent.launcher.program import Program
from node_agent.launcher.zygote import BOARD

pytestmark = pytest.mark.skipif(
    not kernel.SUPPORTED, reason=f"no system call loop for {platform.machine()}"
)
WAIT_S = 20.0


class Zygote:
    """The launcher's end of a running one."""

    def __init__(self, way: socket.socket) -> None:
        self._way = way

    def closed(self, place: int, *, given: int) -> int:
        """Sent ``given`` descriptors and a list that closes one of them: what came of it."""
        to = Program(BOARD.set_up, BOARD.sink, GIVEN)
        to.label("told", BOARD.stillborn)
        to.call("close", GIVEN + place, store=BOARD.pid, if_error="told", otherwise="told")
        null = os.open("/dev/null", os.O_RDONLY)
        socket.send_fds(self._way, [to.finish(SET_UP_BYTES_MAX)], [null] * given)
        os.close(null)
        return int.from_bytes(self._way.recv(8), "little", signed=True)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Zygote]:
    program = tmp_path / "zygote"
    program.write_bytes(zygote.program())
    program.chmod(0o700)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    taken = [(os.POSIX_SPAWN_DUP2, 0, number) for number in range(CONTROL + 1, GIVEN)]
    actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), CONTROL), *taken]
    pid = os.posix_spawn(program, ["zygote"], {}, file_actions=actions)
    theirs.close()
    ours.settimeout(WAIT_S)
    made = Zygote(ours)
    made.closed(0, given=1)  # then whatever else this process had inherited is closed
    yield made
    ours.close()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "it ends when the launcher is gone"


def test_a_list_may_come_with_more_descriptors_than_the_one_before(running: Zygote) -> None:
    """recvmsg(2) writes into the header how much room was used; that is not the next one's room."""
    counts = (1, 2, 3, 5, 12, 1, 12)
    assert [running.closed(count - 1, given=count) for count in counts] == [0] * len(counts)


def test_what_was_given_for_one_list_is_gone_for_the_next(running: Zygote) -> None:
    assert running.closed(2, given=3) == 0
    assert running.closed(1, given=1) == -errno.EBADF
