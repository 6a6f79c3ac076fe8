"""Out of descriptors, on either side: an attempt fails and says so, nothing leaks, nobody dies."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from _socket import AF_UNIX, SOCK_SEQPACKET
from _socket import socket as raw_socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from node_agent import agent
from node_agent.launcher import board, cgroups, jobs, kernel, rights, zygote
from node_agent.launcher.cgroups import Mounted, Tree
from node_agent.launcher.child import Shape
from node_agent.launcher.doors import RUN_FDS, Doors
from node_agent.launcher.jobs import Job
from node_agent.launcher.main import Launcher
from node_agent.sandbox import native, streams
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxPlan
from node_agent.sandbox.protocol import Message

OUT_OF_THEM = OSError(errno.EMFILE, "Too many open files")


def opened() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """As many descriptors can be opened, or a few more where there are holes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    fill = [os.open("/", os.O_PATH) for _ in range(highest)]  # no holes below
    used = max(*fill, highest) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fill:
            os.close(fd)


def raises(*_: object, **__: object) -> Any:
    raise OUT_OF_THEM


# --- limits -----------------------------------------------------------------------------------


def test_the_agent_takes_all_descriptors_that_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(agent, "run_process", lambda *_: 0)
    monkeypatch.setattr(agent, "configure_logging", lambda *_: None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
    try:
        assert agent.main(["--config", "none", "--name", "n"]) == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_how_many_are_left_is_seen_from_the_lowest_free_number() -> None:
    before = opened()
    with room_for(20):
        rights.require(20, 0)
        with pytest.raises(OSError, match="20 are left") as caught:
            rights.require(21, 0)
        assert caught.value.errno == errno.EMFILE
    assert opened() == before


# --- the launcher -----------------------------------------------------------------------------


def test_a_message_whose_descriptors_do_not_all_fit_brings_none() -> None:
    """By its place one would pass for another: the write end of a pipe for a job's inputs."""
    ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
    doors = Doors(raw_socket(AF_UNIX, SOCK_SEQPACKET, 0, ours.detach()), None, -1)
    socket.send_fds(theirs, [b"{}"], [0] * RUN_FDS)
    before = opened()
    with room_for(RUN_FDS - 2):
        assert doors.receive() == (b"{}", [])
    assert opened() == before
    socket.send_fds(theirs, [b"{}"], [0] * RUN_FDS)
    data, fds = doors.receive() or (b"", [])
    assert (data, len(fds)) == (b"{}", RUN_FDS)
    for fd in fds:
        os.close(fd)
    doors.hang_up()
    theirs.close()


def test_an_init_without_a_descriptor_for_it_is_killed_and_waited_for() -> None:
    ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    theirs.send(pid.to_bytes(8, "little", signed=True))
    way = raw_socket(AF_UNIX, SOCK_SEQPACKET, 0, ours.detach())
    with pytest.raises(OSError, match="no descriptor is left"):
        zygote._ask(way, b"list", [])
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    way.close()
    theirs.close()


def shape() -> Shape:
    made = cast("Any", object.__new__(Shape))
    made.io, made.cpus, made.mems, made.devices = (0, 0), (), (), []
    return cast("Shape", made)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    """A v2 hierarchy that holds nothing and two of v1, as folders."""
    for name in ("v2", "cpu", "cpuacct"):
        (tmp_path / name).mkdir()
    mounted = [
        Mounted(frozenset({name} - {"v2"}), str(tmp_path / name))
        for name in ("v2", "cpu", "cpuacct")
    ]
    made = cgroups.open_tree("outrider-a.1", mounted, frozenset())
    assert made.v2 is not None and made.problems == {}
    made.v1.setdefault("cpuacct", cgroups.Group(os.open(tmp_path, os.O_RDONLY), "extra"))
    yield made


def job_folders(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("j1") if path.is_dir()]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("what", ["socketpair", "cgroup.procs", "j1"])
def test_a_sandbox_that_cannot_be_made_leaves_nothing(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, nth: int
) -> None:
    """Neither a descriptor nor a cgroup, wherever the numbers ran out."""
    real, seen = os.open, list[str]()

    def limited(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        seen.append(path)
        if path == what and seen.count(what) == nth:
            raise OUT_OF_THEM
        return real("/", os.O_PATH) if path == "cgroup.procs" else real(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", limited)
    if what == "socketpair":
        monkeypatch.setattr(jobs, "socketpair", raises)
    before = opened()
    with pytest.raises(OSError, match="Too many open files"):
        jobs.make(tree, "j1", shape(), 0)
    assert opened() == before
    assert job_folders(tmp_path) == []


def test_a_work_directory_without_a_descriptor_is_no_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(kernel, "pidfd_send_signal", lambda _fd, number: killed.append(number))
    job = cast("Any", object.__new__(Job))
    ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
    job.control = raw_socket(AF_UNIX, SOCK_SEQPACKET, 0, ours.detach())
    job.work_fd = job.pidfd = -1
    job.failure, job.ready = None, False
    socket.send_fds(theirs, [board.READY], [0])
    with room_for(0):
        assert job.on_control() == "report"
    assert not job.ready and len(killed) == 1
    assert job.failure[:2] == ("work directory", errno.EMFILE)
    job.control.close()
    theirs.close()


@pytest.mark.parametrize(("cause", "told"), [("exited", "sandbox_failed"), ("killed", "killed")])
def test_a_result_that_cannot_be_opened_for_want_of_a_descriptor(cause: str, told: str) -> None:
    ends: list[tuple[dict[str, object], tuple[int, int]]] = []
    launcher = cast("Any", object.__new__(Launcher))
    launcher._jobs, launcher._doors = {"a": None}, SimpleNamespace(agent=None)
    launcher._end = lambda _key, outcome, fds: ends.append((outcome, fds))
    job = SimpleNamespace(
        key="a", outcome=lambda _: {"cause": cause, "exit_code": 0}, open_result=raises
    )
    launcher._conclude(job, 0)
    ((outcome, fds),) = ends
    assert (outcome["cause"], fds, launcher._jobs) == (told, (-1, -1), {})


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_only_the_file_itself_can_be_a_result_refused(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    job = cast("Any", object.__new__(Job))
    job.work_fd = 0

    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(kernel, "openat2", refused)
    with pytest.raises(OSError, match=os.strerror(number)):
        job.open_result()
    number = errno.ELOOP
    assert job.open_result()[1].startswith("result cannot be opened")


# --- the agent --------------------------------------------------------------------------------


def sandbox() -> Any:
    """The agent's side, with a channel that takes everything."""
    made = cast("Any", object.__new__(NativeSandbox))

    async def send(*_: object) -> None: ...

    made._channel = SimpleNamespace(send=send)
    made._running, made._found, made._dead = {}, {}, ""
    return made


@pytest.mark.parametrize("given", [0, 1])
async def test_an_end_whose_result_was_lost_on_the_way_is_no_success(given: int) -> None:
    ours = sandbox()
    running = ours._running["a"] = native._Running(None)
    said = Message(op="ended", key="a", cause="exited", exit_code=0, fds=("result", "work"))
    before = opened()
    ours._on_message(said, [os.open("/", os.O_RDONLY) for _ in range(given)])
    assert opened() == before
    ended = running.ended.result()
    assert (ended.message.cause, ended.message.exit_code) == ("sandbox_failed", None)
    assert (ended.result, ended.work_fd) == (None, -1)
    assert "result, work" in ended.message.detail


async def test_one_that_was_killed_stays_killed() -> None:
    ours = sandbox()
    running = ours._running["a"] = native._Running(None)
    ours._on_message(Message(op="ended", key="a", cause="killed", fds=("work",)), [])
    assert running.ended.result().message.cause == "killed"


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("payload", [b"", bytes(100_000)], ids=["none", "large"])
async def test_a_job_whose_pipes_cannot_be_made_leaves_none(
    monkeypatch: pytest.MonkeyPatch, nth: int, payload: bytes
) -> None:
    real, made = os.pipe, list[int]()

    def limited() -> tuple[int, int]:
        made.append(1)
        if len(made) == nth:
            raise OUT_OF_THEM
        return real()

    monkeypatch.setattr(os, "pipe", limited)
    plan = SandboxPlan(key="a", argv=("true",))
    before = opened()
    given = os.open("/", os.O_PATH)
    with pytest.raises(OSError, match="Too many open files"):
        await sandbox()._run(plan, native._Running(None), payload, None, (given,), None)
    await asyncio.sleep(0)
    assert opened() == before


def test_a_payload_that_finds_no_memory_leaves_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "pack", raises)
    before = opened()
    with pytest.raises(OSError, match="Too many open files"):
        streams.input_of(bytes(100_000))
    assert opened() == before
