"""The images that this node offers: found at start, unpacked one after the other beside the work.

An image that cannot be had is one line in the log, and not offered; the agent goes on without it.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from idl.errors import PlatformFaultError
from node_agent.core.images import ImageSource, ReadyImage
from node_agent.images.bounds import (
    FREE_BYTES_KEPT,
    IMAGE_BYTES_MAX,
    IMAGE_FILES_MAX,
    UNPACK_TIMEOUT_S,
)
from node_agent.images.unpack import ROOT_NAME, TEMPORARY, Answer, Request
from node_agent.sandbox.plan import Enforcement

WAIT_S: Final = 30.0
"""How long an accepted attempt waits for its image: as long as for the launcher."""
_LINE_BYTES_MAX: Final = 1 << 17
"""One answer of the process that unpacks: the environment is the largest part."""
_CODE_ROOT: Final = str(Path(__file__).resolve().parents[2])
_BOOT: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from node_agent.images.unpack import main; sys.exit(main())"
)

log = logging.getLogger(__name__)


class ImageBounds(msgspec.Struct, frozen=True):
    """What one image may take; the free bytes are of the state directory's disk."""

    bytes_max: int = IMAGE_BYTES_MAX
    files_max: int = IMAGE_FILES_MAX
    free_bytes_min: int = FREE_BYTES_KEPT


class NodeImages:
    """Images by name. `paths` is what the launcher must be told at its start."""

    def __init__(
        self,
        sources: Mapping[str, ImageSource],
        state: Path,
        bounds: ImageBounds | None = None,
    ) -> None:
        """`state`: the agent's state directory; images are unpacked below it. Raises OSError."""
        self._sources = dict(sources)
        self._bounds = bounds or ImageBounds()
        self._state = state.resolve()
        self._store = self._state / "images"
        self._ready: dict[str, ReadyImage] = {}
        self._launcher_lacks: frozenset[str] = frozenset()
        self._settled = {name: asyncio.Event() for name in self._layouts}
        for name, source in self._sources.items():
            if source.kind == "dir":
                self._take_directory(name, source)
        if self._layouts:
            self._store.mkdir(mode=0o700, exist_ok=True)

    @property
    def _layouts(self) -> dict[str, ImageSource]:
        return {name: source for name, source in self._sources.items() if source.kind == "oci"}

    def _take_directory(self, name: str, source: ImageSource) -> None:
        root = Path(os.path.realpath(source.path))
        if not root.is_dir():
            _refused(name, f"{source.path} is not a directory, or not to be seen by the agent")
        elif self._state.is_relative_to(root):
            _refused(name, f"{source.path} holds the agent's state directory")
        else:
            self._ready[name] = ReadyImage(name, str(root))

    @property
    def paths(self) -> tuple[str, ...]:
        """Directories that are images, or below which images are unpacked."""
        roots = dict.fromkeys(image.root for image in self._ready.values())
        return (*roots, *((str(self._store),) if self._layouts else ()))

    async def get(self, name: str) -> ReadyImage | None:
        """The image of a job; None for "", the host's root. Waits a little for one that is about
        to be found again after a restart. Raises PlatformFaultError where it is not here."""
        if not name:
            return None
        if name in self._layouts and name not in self._ready:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await self._settled[name].wait()
        if name not in self._ready:
            raise PlatformFaultError(f"image {name} is not on this node")
        return self._ready[name]

    def offered(self, enforcement: Enforcement) -> dict[str, str]:
        """Name → digest of those that the launcher of now can use."""
        usable = {
            name: image.digest
            for name, image in sorted(self._ready.items())
            if enforcement.has_image(image.root)
        }
        lacks = frozenset(self._ready) - frozenset(usable)
        for name in sorted(lacks - self._launcher_lacks):
            _refused(name, "the launcher that runs cannot use it; see its notes, or it is older "
                           "than this setting and is replaced once it has no job")  # fmt: skip
        self._launcher_lacks = lacks
        return usable

    async def unpack(self, changed: Callable[[], None], *, sweep: bool) -> None:
        """Unpacks what is not yet; `changed` is called for each that can be offered now.

        `sweep`: no job of before runs, so that images which nobody names any more can go; they
        stay while one that is named cannot be had, for it may be among them.
        """
        if not self._store.exists():
            return
        await asyncio.to_thread(_remove, self._names(), lambda name: name.startswith(TEMPORARY))
        used: set[str] = set()
        for name, source in self._layouts.items():
            folder = await self._unpack_one(name, source)
            self._settled[name].set()
            used.add(folder)
            if folder:
                changed()
        if sweep and "" not in used:
            unused = await asyncio.to_thread(_remove, self._names(), lambda one: one not in used)
            if unused:
                log.info("images removed", extra={"folders": unused})

    def _names(self) -> list[Path]:
        return list(self._store.iterdir())

    async def _unpack_one(self, name: str, source: ImageSource) -> str:
        """Its folder in the store; "" where it was refused, which is told."""
        request = Request(
            layout=source.path, ref=source.ref, store=str(self._store),
            bytes_max=self._bounds.bytes_max, files_max=self._bounds.files_max,
            free_bytes_min=self._bounds.free_bytes_min,
        )  # fmt: skip
        try:
            async with asyncio.timeout(UNPACK_TIMEOUT_S):
                answer = await _run(name, request)
        except TimeoutError:
            answer = Answer(refused=f"not unpacked within {UNPACK_TIMEOUT_S:g} s")
        except (OSError, ValueError, msgspec.DecodeError) as error:  # ValueError: too long a line
            answer = Answer(refused=f"the process that unpacks it failed: {error}")
        found = answer.unpacked
        if found is None:
            _refused(name, answer.refused or "the process that unpacks it was killed")
            return ""
        root = self._store / found.folder / ROOT_NAME
        self._ready[name] = ReadyImage(name, str(root), found.digest, found.env)
        log.info(
            "image ready",
            extra={
                "image": name, "digest": found.digest, "reused": answer.reused,
                "bytes": found.bytes, "entries": found.entries, "left_out": found.left_out,
            },
        )  # fmt: skip
        return found.folder


async def _run(name: str, request: Request) -> Answer:
    """Starts the process and hears it to its end; it is killed where we stop listening."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _BOOT, _CODE_ROOT, str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES_MAX,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(msgspec.json.encode(request))
        child.stdin.close()
        last = Answer()
        async for line in child.stdout:
            last = msgspec.json.decode(line, type=Answer)
            if last.at:
                log.info("unpacking", extra={"image": name, "at": last.at})
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            child.kill()
        await child.wait()
    return last


def _remove(folders: Iterable[Path], chosen: Callable[[str], bool]) -> list[str]:
    removed = [folder for folder in folders if chosen(folder.name)]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in removed]


def _refused(name: str, reason: str) -> None:
    log.error("image not offered", extra={"image": name, "reason": reason})
