"""The launcher's connection to its agent: nothing said is lost, and nothing blocks."""

import os
import select
import socket
from _socket import AF_UNIX, SOCK_SEQPACKET
from _socket import socket as raw_socket
from collections.abc import Iterator

import pytest

from node_agent.launcher import wire
from node_agent.launcher.doors import BACKLOG, MESSAGE_BYTES_MAX, RUN_FDS, Doors

READ_BYTES = 1 << 16
NO_SIGNALS = -1


class Pair:
    """Doors with an agent behind them, and the poll that watches them."""

    def __init__(self) -> None:
        ours, self.agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.doors = Doors(raw_socket(AF_UNIX, SOCK_SEQPACKET, 0, ours.detach()), None, NO_SIGNALS)
        self.poll = select.epoll()
        self.doors.watch(self.poll)

    def events(self) -> int:
        """What the poll says of the agent's socket now."""
        return dict(self.poll.poll(0)).get(self.doors.agent_fd, 0)

    def close(self) -> None:
        self.doors.hang_up()
        self.agent.close()
        self.poll.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_a_slow_agent_gets_everything_in_order_and_room_is_waited_for_only_then(pair: Pair) -> None:
    said = [f"{number:0{READ_BYTES // 8}d}".encode() for number in range(200)]
    for message in said:
        pair.doors.send(message)
    assert pair.events() == 0, "there is no room, or the agent said something"
    heard: list[bytes] = []
    while len(heard) < len(said):
        heard.append(pair.agent.recv(READ_BYTES))
        if pair.events() & select.EPOLLOUT:
            pair.doors.flush()
    assert heard == said
    assert pair.events() == 0, "nothing is queued, so room is of no interest"


def test_descriptors_arrive_with_their_message(pair: Pair) -> None:
    ends = [os.pipe() for _ in range(RUN_FDS)]
    socket.send_fds(pair.agent, [b"{}"], [read for read, _ in ends])
    assert pair.events() & select.EPOLLIN
    received = pair.doors.receive()
    assert received is not None
    data, fds = received
    assert data == b"{}"
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(read).st_ino for read, _ in ends]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in [*fds, *(end for pipe in ends for end in pipe)]:
        os.close(fd)


def test_nothing_said_is_told_from_an_agent_that_went_away(pair: Pair) -> None:
    assert pair.doors.receive() is None
    pair.agent.close()
    assert pair.doors.receive() == (b"", [])
    pair.doors.hang_up()
    assert pair.doors.receive() is None
    pair.doors.send(b"nobody is there to whom this could be told")


def test_what_was_queued_for_one_agent_is_not_told_to_the_next(pair: Pair) -> None:
    for _ in range(200):
        pair.doors.send(bytes(READ_BYTES))
    pair.doors.hang_up()
    ours, agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pair.doors.admit(raw_socket(AF_UNIX, SOCK_SEQPACKET, 0, ours.detach()))
    pair.doors.send(b"hello")
    assert agent.recv(MESSAGE_BYTES_MAX) == b"hello"
    agent.send(b"{}")
    assert pair.events() == select.EPOLLIN
    agent.close()


def test_a_message_too_long_for_the_socket_is_told_with_less_detail(pair: Pair) -> None:
    """The kernel refuses it for ever (EMSGSIZE); that one job must not end the launcher."""
    end = {"op": "ended", "key": "a", "exit_code": 127, "detail": "\\" * 400_000}
    pair.doors.send(wire.dumps(end))
    pair.doors.send(b"{}")
    told = wire.loads(pair.agent.recv(MESSAGE_BYTES_MAX))
    assert len(told["detail"]) == 1000 and told["detail"].endswith("\\ …")
    assert told | {"detail": ""} == end | {"detail": ""}
    assert pair.agent.recv(MESSAGE_BYTES_MAX) == b"{}"


def test_once_closed_nobody_is_listened_to(tmp_path: os.PathLike[str]) -> None:
    ours, agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    named = raw_socket(AF_UNIX, SOCK_SEQPACKET, 0)
    named.bind(os.fspath(tmp_path) + "/socket")
    named.listen(BACKLOG)
    doors = Doors(raw_socket(AF_UNIX, SOCK_SEQPACKET, 0, ours.detach()), named, NO_SIGNALS)
    with select.epoll() as poll:
        doors.watch(poll)
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        caller.connect(os.fspath(tmp_path) + "/socket")
        assert dict(poll.poll(0)) == {doors.listener_fd: select.EPOLLIN}
        accepted = doors.accept()
        assert accepted is not None, "of our own user"
        accepted.close()
        doors.close()
        assert doors.listener_fd == -1
        agent.send(b"{}")
        assert poll.poll(0) == []
    with pytest.raises(ConnectionRefusedError):
        caller.connect(os.fspath(tmp_path) + "/socket")
    doors.hang_up()
    caller.close()
    agent.close()
