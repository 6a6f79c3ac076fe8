"""The runtimes we know: how to find one, which versions will do, and how they differ."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

VERSION_TIMEOUT_S: Final = 20.0
"""`--version` of a runtime written in Go on a loaded machine."""

Version = tuple[int, ...]


class Kind(NamedTuple):
    """One runtime by name.

    ``version_min``: older ones are refused. ``version_good``: older ones are used and remarked
    upon. ``detaches``: `run --detach` leaves the job to us. ``holds_namespaces``: it can join a pid
    namespace. ``own_kernel``: a kernel of its own, which wants no seccomp profile. ``joins_v2``: it
    puts the job into the v2 cgroup of a hybrid host, too; where it is in that itself and cannot
    start the job, it tries to remove it for five seconds.
    """

    options: tuple[str, ...]
    version_min: Version
    version_good: Version
    good_because: str
    detaches: bool = True
    own_kernel: bool = False
    joins_v2: bool = False

    @property
    def pids_spare(self) -> int:
        """Host tasks besides the job's: threads of a kernel in user space."""
        return 1000 if self.own_kernel else 0


KINDS: Final[dict[str, Kind]] = {
    "crun": Kind((), (1, 8), (1, 8), "", joins_v2=True),
    "runc": Kind(
        (),
        (1, 1),
        (1, 2, 8),
        "CVE-2025-31133, -52565 and -52881 are fixed there (a distribution may have them fixed)",
    ),
    "runsc": Kind(
        ("--network=none", "--ignore-cgroups", "--oci-seccomp"),
        (),  # numbered by date; one built from its Go module says none
        (),
        "",
        detaches=False,
        own_kernel=True,
    ),
}


class Runtime(NamedTuple):
    """One that is there."""

    name: str
    path: str
    version: str
    options: tuple[str, ...]
    detaches: bool
    holds_namespaces: bool
    own_kernel: bool
    pids_spare: int
    joins_v2: bool
    note: str


class RuntimeUnusable(Exception):  # noqa: N818 - reads as what happened, as events do
    """No such runtime, or one that is too old; the message is one line and says what to do."""


def find(name: str, path: str = "") -> Runtime:
    """The runtime ``name``, by ``path`` or along PATH. Raises RuntimeUnusable."""
    kind = KINDS[name]
    found = path or shutil.which(name)
    if not found or not os.access(found, os.X_OK):
        raise RuntimeUnusable(
            f"the sandbox {name!r} needs the program {path or name}, which is not installed here: "
            f"install it (Debian: apt-get install {name}), or choose --sandbox native"
        )
    try:
        done = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeUnusable(f"{found} --version failed: {error}") from error
    version = numbers(text := version_of(done.stdout) or "unknown")
    if version < kind.version_min:
        wanted = ".".join(map(str, kind.version_min))
        raise RuntimeUnusable(
            f"{found} is version {text}, at least {wanted} is needed: upgrade it, or "
            "choose --sandbox native"
        )
    note = ""
    if version < kind.version_good:
        good = ".".join(map(str, kind.version_good))
        note = f"{name} {text} is older than {good}: {kind.good_because}"
    return Runtime(
        name, str(Path(found).absolute()), text, kind.options, kind.detaches, kind.detaches,
        kind.own_kernel, kind.pids_spare, kind.joins_v2, note,
    )  # fmt: skip


def version_of(text: str) -> str:
    """The version in the first line of `--version`."""
    first = text.splitlines()[0] if text else ""
    found = re.search(r"(\d+(?:\.\d+)+\S*)", first)
    return found.group(1) if found else ""


def numbers(text: str) -> Version:
    """``1.1.5+ds1`` → (1, 1, 5)."""
    leading = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()


class Fault(NamedTuple):
    """Why a runtime did not start a job. ``exit_code`` 0: not the job's own fault."""

    exit_code: int
    text: str


_TOLD_MAX = 4096
# How the runtimes say that the command or its folder does not exist, or is not to be executed.
_NOT_FOUND = re.compile(
    r"executable file .*not found|exec: .*no such file|stat .*: no such file"
    r"|(chdir|cwd).*(no such file|not a directory)|exec.*[Nn]o such file"
    r"|error finding executable|failed to load .*no such file"
    r"|(exec|executable).*[Ff]ile name too long"
)
_NOT_EXECUTABLE = re.compile(
    r"(exec|executable|failed to load ).*([Pp]ermission denied|exec format|[Ii]s a directory"
    r"|[Aa]rgument list too long)"
)


def fault_of(log: str) -> Fault | None:
    """What the last error of a runtime's JSON log means; None where it has none."""
    message = ""
    for line in log.split("\n"):  # names in it may hold what `splitlines` takes for an end
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line cut short
        if isinstance(entry, dict) and entry.get("level") in {"error", "fatal"}:
            message = str(entry.get("msg", ""))
    if not message:
        return None
    if len(message) > _TOLD_MAX:  # by the job's own command, of any length
        message = f"{message[: _TOLD_MAX // 2]} … {message[-_TOLD_MAX // 2 :]}"
    if _NOT_FOUND.search(message):
        return Fault(127, message)
    if _NOT_EXECUTABLE.search(message):
        return Fault(126, message)
    return Fault(0, message)
