"""The process that unpacks one image: `python -m node_agent.images.unpack`, a request on stdin.

A process, so that a hostile image has neither the agent's event loop nor its memory. It answers
with lines of JSON on stdout: `{"at": …}` while it works, then `{"unpacked": …}` or
`{"refused": …}`.

The store is a folder of `<format>-sha256-<digest>/`, each with `root/` and `image.json`, which is
written last, before the folder gets its name; what is in the store is whole.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from node_agent.images.bounds import MEMORY_BYTES_MAX, NICE, Budget, ImageRefusedError
from node_agent.images.layers import Root
from node_agent.images.layout import Image, Layout
from node_agent.launcher import kernel

FORMAT: Final = "v1"
"""Of what is in the store: a change of what is made of an image makes it anew."""
TEMPORARY: Final = "tmp."
ROOT_NAME: Final = "root"
_FACTS_NAME: Final = "image.json"
_FACTS_BYTES_MAX: Final = 1 << 20


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to unpack, where to, and how much it may take."""

    layout: str
    ref: str
    store: str
    bytes_max: int
    files_max: int
    free_bytes_min: int


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """An image in the store. `folder`: its name there. `left_out`: devices and FIFOs."""

    digest: str
    folder: str
    env: dict[str, str]
    bytes: int
    entries: int
    left_out: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line."""

    at: str = ""
    refused: str = ""
    unpacked: Unpacked | None = None
    reused: bool = False


def unpack(request: Request, say: Answers) -> Answer:
    """The image of the layout in the store, unpacked unless it is there. Raises ImageRefusedError,
    OSError."""
    layout = Layout(Path(request.layout))
    descriptor = layout.find(request.ref)
    name = f"{FORMAT}-{descriptor.digest.replace(':', '-')}"
    known = _known(Path(request.store) / name)
    if known is not None:
        return Answer(unpacked=known, reused=True)
    image = layout.image(descriptor)
    budget = Budget(request.bytes_max, request.files_max, request.store, request.free_bytes_min)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=request.store))
    try:
        left_out = _lay(image, temporary, budget, say)
        facts = Unpacked(
            digest=image.digest, folder=name, env=image.env, bytes=budget.bytes,
            entries=budget.files, left_out=left_out,
        )  # fmt: skip
        (temporary / _FACTS_NAME).write_bytes(msgspec.json.encode(facts))
        _publish(temporary, Path(request.store) / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Answer(unpacked=facts)


def _lay(image: Image, temporary: Path, budget: Budget, say: Answers) -> int:
    """All layers into `root`. How many entries were left out."""
    (temporary / ROOT_NAME).mkdir(mode=0o755)
    fd = os.open(temporary / ROOT_NAME, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    root = Root(fd, budget)
    try:
        for number, layer in enumerate(image.layers, 1):
            say(Answer(at=f"layer {number} of {len(image.layers)}"))
            root.lay(layer)
    finally:
        root.close()
        os.close(fd)
    return root.left_out


def _publish(temporary: Path, target: Path) -> None:
    """Onto the disk, then under its name: whoever sees the name sees all of it."""
    temporary.chmod(0o755)
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kernel.syncfs(fd)
        temporary.rename(target)
        kernel.syncfs(fd)
    finally:
        os.close(fd)


def _known(folder: Path) -> Unpacked | None:
    try:
        with (folder / _FACTS_NAME).open("rb") as file:
            return msgspec.json.decode(file.read(_FACTS_BYTES_MAX), type=Unpacked)
    except FileNotFoundError:
        return None


class Answers:
    """Lines on a stream, each at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, answer: Answer) -> None:
        os.write(self._fd, msgspec.json.encode(answer) + b"\n")


def _confine(parent: int) -> None:
    """Ends with the agent, yields to jobs, and takes no more memory than it needs."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.nice(NICE)
    os.umask(0o022)
    for kind, most in ((resource.RLIMIT_AS, MEMORY_BYTES_MAX), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (value, value))


def main() -> int:
    """Entry point; argv[1] is the agent's pid."""
    _confine(int(sys.argv[1]))
    say = Answers(sys.stdout.fileno())
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        say(unpack(request, say))
    except (ImageRefusedError, OSError) as error:
        say(Answer(refused=str(error)))
    except MemoryError:
        say(Answer(refused="reading it takes too much memory"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
