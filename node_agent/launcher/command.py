# ruff: noqa: PTH120
# pathlib would add a third to the launcher's memory.
"""The second list of init: what follows from the job. And what its failures mean.

Init receives it by its control socket, when nothing is left to give up. It begins with the last
steps of the job's own process, to which the first list jumps ("execute").
"""

from __future__ import annotations

import errno
import os
import resource

from node_agent.launcher.board import (
    CANDIDATES_MAX,
    COMMAND_BYTES_MAX,
    Board,
)
from node_agent.launcher.child import JobSpec
from node_agent.launcher.interpreter import ARGUMENT, LEAVE
from node_agent.launcher.kernel import AT_FDCWD
from node_agent.launcher.program import Fault, Program

STDIO = (4, 5, 6)  # as they arrive: the lowest free numbers
_INPUTS = 7
_EXIT_NOT_EXECUTED = 127
_READ_ONLY_FILE, _FILE, _SEALED_FOLDER, _FOLDER = 0o444, 0o644, 0o555, 0o755

_NOT_RUN = {
    errno.ENOENT: 127,
    errno.ENOTDIR: 127,
    errno.ELOOP: 127,
    errno.ENAMETOOLONG: 127,
    errno.EACCES: 126,
    errno.EPERM: 126,
    errno.ENOEXEC: 126,
    errno.EISDIR: 126,
    errno.E2BIG: 126,
    errno.EINVAL: 126,
    errno.ETXTBSY: 126,
    errno.ELIBBAD: 126,
}
# Steps that fail by what the job asked for, with the exit code that says so to its owner.
_JOB_FAULTS = {
    "exec": _NOT_RUN,
    "working directory": _NOT_RUN,
    "inputs": dict.fromkeys((errno.ENOSPC, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), 126),
}


def job_list(
    board: Board, spec: JobSpec, holds: frozenset[str], first: Program
) -> tuple[Program, bytes]:
    """The second list: it begins with what the job's own process does last (the first list's
    "execute"). Raises OSError for a command that no list can hold."""
    if any("\0" in text for text in (*spec.argv, *spec.env, *spec.env.values(), spec.cwd)):
        raise OSError(errno.EINVAL, "a command must not contain NUL")
    to = Program(board.job, board.sink, _INPUTS + 1 if spec.inputs else _INPUTS)
    for name in ("spawn", "failed"):
        to.label(name, first.labelled(name, 0))
    to.minus(0, 0, zero="begin")
    _execute(to, board, spec)
    to.label("begin")
    to.step = "rlimits"
    files = max(len(STDIO), spec.open_files_max)
    limit(to, resource.RLIMIT_NOFILE, lower(resource.RLIMIT_NOFILE, files))
    # Init counts, too.
    limit(to, resource.RLIMIT_NPROC, lower(resource.RLIMIT_NPROC, spec.pids_max + 1))
    if "cpu_time" not in holds and spec.cpu_ms:
        # Nothing counts the group: SIGXCPU for each process, SIGKILL a second later.
        seconds = -(-spec.cpu_ms // 1000)
        hard = lower(resource.RLIMIT_CPU, seconds + 1)
        limit(to, resource.RLIMIT_CPU, min(seconds, hard - 1), hard)
    if spec.inputs:
        _place_inputs(to, spec)
    to.step = "working directory"
    to.call("chdir", spec.cwd, otherwise="spawn")
    return to, to.finish(COMMAND_BYTES_MAX)


def limit(to: Program, kind: int, soft: int, hard: int = -1) -> None:
    """setrlimit(2); the hard limit is the soft one unless it is said."""
    to.call("prlimit64", 0, kind, to.structure(soft, soft if hard < 0 else hard))


def lower(kind: int, value: int) -> int:
    """Limits are only ever lowered: raising takes CAP_SYS_RESOURCE, which agents often lack."""
    hard = resource.getrlimit(kind)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _place_inputs(to: Program, spec: JobSpec) -> None:
    """Copy the files, which lie one after the other in one descriptor, below /work.

    By now init is nobody but the job's own uid, in a file system that nobody else has seen.
    """
    to.step = "inputs"
    made: list[str] = []
    sealed: list[str] = []
    for number, given in enumerate(spec.inputs):
        path = f"/work/{given.path}"
        for folder in parents(given.path, made):
            to.call("mkdirat", AT_FDCWD, f"/work/{folder}", _FOLDER)
        folder = os.path.dirname(path)
        if not given.writable and folder not in sealed:
            sealed.append(folder)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        target = to.opens("openat", AT_FDCWD, path, flags, _FILE)
        if given.size_bytes:
            _copy(to, target, given.size_bytes, f"file {number}")
        to.call("fchmod", target, _FILE if given.writable else _READ_ONLY_FILE)
        to.close(target)
    for folder in sealed:
        if folder != "/work":
            to.call("fchmodat", AT_FDCWD, folder, _SEALED_FOLDER)
    to.close(_INPUTS)


def _copy(to: Program, target: int, size_bytes: int, name: str) -> None:
    """sendfile(2) until nothing is left; the end of the source before that is EIO."""
    to.label(f"{name} more")
    left, rest = to.following(ARGUMENT + 3, 0), to.following(ARGUMENT)
    to.call("sendfile", target, _INPUTS, 0, size_bytes, store=to.following(ARGUMENT + 1),
            expected=0, if_equal=f"{name} short")  # fmt: skip
    to.minus(size_bytes, 0, store=left, zero=f"{name} done")
    to.load(left, store=rest, otherwise=f"{name} more")
    to.label(f"{name} short")
    to.minus(0, errno.EIO)
    to.label(f"{name} done")


def _execute(to: Program, board: Board, spec: JobSpec) -> None:
    """The end of the job's own process before the job's program."""
    to.step = "exec"
    if spec.shape.probe:
        to.minus(spec.pids_max, 0, store=board.inside)
        to.leave(LEAVE)
        return
    argv = to.array([word.encode() for word in spec.argv])
    env = to.array([f"{name}={value}".encode() for name, value in spec.env.items()])
    for number, path in enumerate(candidates_of(spec)):
        to.call("execve", path, argv, env, store=board.results + 8 * number,
                if_error=f"try {number + 1}")  # fmt: skip
        to.label(f"try {number + 1}")
    to.minus(1, 0, store=board.tried)
    to.call("exit_group", _EXIT_NOT_EXECUTED)


def candidates_of(spec: JobSpec) -> list[str]:
    """Where the program may be. Raises OSError if there are too many places to look."""
    program = spec.argv[0]
    if "/" in program:
        return [program]
    path = spec.env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    found = [f"{folder}/{program}" for folder in path.split(":") if folder]
    if len(found) > CANDIDATES_MAX:
        raise OSError(errno.E2BIG, f"PATH has {len(found)} folders, at most {CANDIDATES_MAX}")
    return found


def why_not_executed(program: str, tried: list[str], results: list[int]) -> Fault:
    """The answers to every try, made one fault: the worst, or that it is nowhere."""
    for path, result in reversed(list(zip(tried, results, strict=False))):
        if -result not in {errno.ENOENT, errno.ENOTDIR} or "/" in program:
            return Fault("exec", f"{path!r} inside the sandbox", -result)
    fault = Fault("exec", f"no {program!r} in PATH inside the sandbox", 0)
    fault.errno = errno.ENOENT
    return fault


def exit_code_of(fault: Fault) -> int:
    """For what the job asked and cannot be done, as a shell would say it; 0: not its fault."""
    return _JOB_FAULTS.get(fault.step, {}).get(fault.errno, 0)


def parents(path: str, made: list[str]) -> list[str]:
    """Folders above a relative path that are not ``made`` yet, the highest first; now they are."""
    parts = path.split("/")[:-1]
    folders = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    new = [folder for folder in folders if folder not in made]
    made += new
    return new
