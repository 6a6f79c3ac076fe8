"""Lists of system calls: the loop that runs them, how they are written, what their ends mean."""

import errno
import json
import platform
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from node_agent.launcher import kernel, wire
from node_agent.launcher.board import Board
from node_agent.launcher.cgroups import JobCgroup
from node_agent.launcher.child import JobSpec
from node_agent.launcher.command import candidates_of, exit_code_of, why_not_executed
from node_agent.launcher.interpreter import (
    AARCH64_SOURCE,
    CODE,
    DATA_BASE,
    EXPECTED,
    IF_EQUAL,
    IF_ERROR,
    OTHERWISE,
    RECORD_BYTES,
    STORE,
    WORDS,
    X86_64_SOURCE,
    executable,
)
from node_agent.launcher.jobs import Job
from node_agent.launcher.program import Program, blame
from node_agent.sandbox.plan import SandboxPlan
from node_agent.sandbox.protocol import plan_message
from node_agent.sandbox.syscall_table import AARCH64, X86_64

MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}
FAULT, SINK, LIST = DATA_BASE, DATA_BASE + 16, DATA_BASE + 64
NOTHING = 2**62


def assembled(source: str, assembler: str, objcopy: str, folder: Path) -> bytes:
    for tool in (assembler, objcopy):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here to assemble the source with (Debian: binutils)")
    (folder / "loop.s").write_text(source)
    objects, binary = folder / "loop.o", folder / "loop.bin"
    subprocess.run([assembler, "-o", objects, folder / "loop.s"], check=True)
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", objects, binary], check=True)
    return binary.read_bytes()


def test_the_x86_64_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the assembler of x86_64 is another package here")
    source = f".intel_syntax noprefix\n{X86_64_SOURCE}"
    assert assembled(source, "as", "objcopy", tmp_path) == CODE["x86_64"]


def test_the_aarch64_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    prefix = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
    found = assembled(AARCH64_SOURCE, f"{prefix}as", f"{prefix}objcopy", tmp_path)
    assert found == CODE["aarch64"]


class Listed:
    """A list by its words, for any machine."""

    def __init__(self, machine: str) -> None:
        self.numbers = MACHINES[machine]
        self.words: list[int] = []

    def add(
        self, call: str | int, *arguments: int, store: int = SINK, expected: int = NOTHING,
        if_equal: int | None = None, if_error: int | None = None, otherwise: int | None = None,
    ) -> None:  # fmt: skip
        """One record; where to go on is said by index."""
        following = len(self.words) // WORDS + 1
        record = [0] * WORDS
        record[0] = self.numbers[call] if isinstance(call, str) else call & 2**64 - 1
        record[1 : 1 + len(arguments)] = arguments
        record[STORE], record[EXPECTED] = store, expected
        for place, way in ((IF_EQUAL, if_equal), (IF_ERROR, if_error), (OTHERWISE, otherwise)):
            record[place] = LIST + RECORD_BYTES * (following if way is None else way)
        self.words += record

    def word(self, index: int, place: int) -> int:
        return LIST + RECORD_BYTES * index + 8 * place


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest) -> str:
    wanted = str(request.param)
    emulator = f"qemu-{wanted}-static"
    if wanted != platform.machine() and shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed (Debian: qemu-user-static)")
    return wanted


def run(listed: Listed, machine: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    data = bytes(LIST - DATA_BASE) + struct.pack(f"<{len(listed.words)}Q", *listed.words)
    program = folder / "program"
    program.write_bytes(executable(machine, LIST, FAULT, data, 1 << 16))
    program.chmod(0o700)
    emulator = [] if machine == platform.machine() else [f"qemu-{machine}-static"]
    return subprocess.run([*emulator, str(program)], capture_output=True, timeout=30, check=False)


def test_a_list_counts_down_and_says_so(machine: str, tmp_path: Path) -> None:
    """Minus, load, store, both ways of a comparison: three times round, one byte each time."""
    one, text = Listed(machine), DATA_BASE + 40
    one.add(-2, 3, 1, store=text, expected=0, if_equal=5)  # 0: left - 1
    one.add("write", 1, text, 1)  # 1
    one.add(-3, text, store=one.word(0, 1))  # 2: left
    one.add(-3, text, store=SINK, otherwise=0)  # 3
    one.add("exit_group", 99)  # 4: never
    one.add("exit_group", 7)  # 5
    done = run(one, machine, tmp_path)
    assert (done.returncode, done.stdout) == (7, b"\x02\x01")


def test_an_error_is_noted_with_its_record(machine: str, tmp_path: Path) -> None:
    one = Listed(machine)
    one.add("close", 999, if_error=2)
    one.add("exit_group", 1)
    one.add("write", 1, FAULT, 16)
    one.add("exit_group", 0)
    done = run(one, machine, tmp_path)
    assert done.returncode == 0
    assert struct.unpack("<qq", done.stdout) == (LIST, -errno.EBADF)


def test_numbers_of_calls_are_those_of_the_kernels_tables() -> None:
    for name, numbers in kernel._NUMBERS.items():
        assert numbers == tuple(MACHINES[machine][name] for machine in kernel.MACHINES), name


def test_a_program_says_whom_to_blame() -> None:
    to = Program(1 << 20, 8, 3)
    to.step = "first"
    to.call("chdir", "/nowhere", if_error="end")
    to.step = "second"
    to.call("mount", "a", "/b", "tmpfs", 0, "size=1", if_error="end")
    to.label("end")
    to.finish(1 << 16)
    fault = blame([to], (1 << 20) + RECORD_BYTES, -errno.EPERM)
    assert (fault.step, fault.errno) == ("second", errno.EPERM)
    assert fault.text == "mount a /b tmpfs size=1: Operation not permitted"
    assert blame([to], 12345, -1).errno == errno.EPROTO


def test_a_program_that_is_too_long_is_refused() -> None:
    to = Program(1 << 20, 8, 3)
    to.call("chdir", "x" * 100, if_error="end")
    to.label("end")
    with pytest.raises(OSError, match="at most 150"):
        to.finish(150)


def test_descriptors_are_the_lowest_free() -> None:
    to = Program(1 << 20, 8, 4)
    first, second = to.opens("openat", 0, "a", 0, 0), to.opens("openat", 0, "b", 0, 0)
    to.close(first)
    assert (first, second, to.opens("openat", 0, "c", 0, 0)) == (4, 5, 4)


def test_the_board_has_room_for_its_messages() -> None:
    board = Board(DATA_BASE)
    assert len(board.image()) == board.set_up - DATA_BASE
    assert board.results + 8 * 100 <= board.ready, "answers to a hundred tries"


def spec(*argv: str, **env: str) -> JobSpec:
    plan = SandboxPlan(key="k", argv=argv, env=env)
    return JobSpec(json.loads(msgspec.json.encode(plan_message(plan))))


@pytest.mark.parametrize(
    ("argv", "results", "code", "words"),
    [
        ("true", [-2, -2], 127, "no 'true' in PATH"),
        ("true", [-13, -2], 126, "'/a/true' inside the sandbox: Permission denied"),
        ("./true", [-2], 127, "'./true' inside the sandbox: No such file"),
        ("/x", [-8], 126, "Exec format error"),
        ("/x", [-12], 0, "Cannot allocate memory"),
    ],
)
def test_the_worst_of_all_tries_is_told(
    argv: str, results: list[int], code: int, words: str
) -> None:
    fault = why_not_executed(argv, candidates_of(spec(argv, PATH="/a:/b")), results)
    assert exit_code_of(fault) == code
    assert words in fault.text


@pytest.mark.parametrize("argv", ["/" + "\\" * 60_000, "\U0001f600" * 20_000])
def test_a_long_program_s_name_is_told_in_part(argv: str) -> None:
    """Quoted and written as JSON it was longer than any message to the agent."""
    fault = why_not_executed(argv, candidates_of(spec(argv, PATH="/a")), [-errno.ENOENT])
    assert exit_code_of(fault) == 127
    assert fault.text.endswith(("inside the sandbox", "No such file or directory"))
    assert len(wire.dumps({"detail": fault.text})) < 100_000


LONG = ":".join(["/a"] * 101)


def test_too_many_places_to_look_are_refused() -> None:
    with pytest.raises(OSError, match="PATH has 101 folders"):
        candidates_of(spec("true", PATH=LONG))


class Init:
    """The launcher's end of an init that takes no list."""

    def sendmsg(self, *_: object) -> None:
        raise OSError(errno.EMSGSIZE, "Message too long")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (spec("true", PATH=LONG), "exec: PATH has 101 folders, at most 100"),
        (spec("x" * 60_000, PATH="/a:/b:/c:/d:/e"), "exec: "),
        (spec("true"), "exec: Message too long: Argument list too long"),
    ],
)
def test_a_command_that_no_list_holds_is_the_job_s_own_fault(
    given: JobSpec, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was the platform's, and tried again elsewhere."""
    killed: list[int] = []
    monkeypatch.setattr(kernel, "pidfd_send_signal", lambda _fd, number: killed.append(number))
    first = Program(1 << 20, 8, 3)
    for name in ("spawn", "failed"):
        first.label(name)
    job = cast("Any", object.__new__(Job))
    job._spec, job._stdio, job._lists, job._holds = given, [], [first], frozenset()
    job.control, job.pidfd, job.failure, job.not_executed = Init(), 3, None, None
    job.cgroup = JobCgroup(None, {}, frozenset(), [])
    job._go()
    assert job.failure is None and len(killed) == 1
    code, text = job.not_executed
    assert code == 126 and text.startswith(words)
