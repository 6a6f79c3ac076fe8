"""An OCI image layout on disk: which image it holds for this machine, and its layers, verified.

Follows the OCI image specification 1.1: `oci-layout`, `index.json`, indexes in indexes, manifests,
configs, layers as tar, gzip or (where the interpreter can) zstd. Docker's media types mean the
same. Nothing is believed that its SHA-256 does not confirm.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import platform
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast

import msgspec

from node_agent.images.bounds import (
    DOCUMENT_BYTES_MAX,
    DOCUMENTS_MAX,
    ENV_BYTES_MAX,
    INDEX_DEPTH_MAX,
    LAYERS_MAX,
    Budget,
    ImageRefusedError,
)
from node_agent.images.tar import TarReader

REF_NAME: Final = "org.opencontainers.image.ref.name"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_LAYOUT_VERSION: Final = "1."
_INDEXES: Final = ("image.index.v1+json", "manifest.list.v2+json")
_MANIFESTS: Final = ("image.manifest.v1+json", "distribution.manifest.v2+json")
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_VARIANTS: Final = {"amd64": ("", "v1"), "arm64": ("", "v8")}
_CHUNK: Final = 1 << 20
_NAMES_TOLD_MAX: Final = 20

_T = TypeVar("_T")


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on."""

    architecture: str = ""
    os: str = ""
    variant: str = ""

    @property
    def fits(self) -> bool:
        """True for this machine."""
        ours = machine()
        return self.os == "linux" and self.architecture == ours and (
            self.variant in _VARIANTS.get(ours, ("",))
        )  # fmt: skip


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """Points to a blob."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def ref(self) -> str:
        """Its name in `index.json`."""
        return (self.annotations or {}).get(REF_NAME, "")


class _Index(msgspec.Struct, frozen=True):
    manifests: list[Descriptor]


class Manifest(msgspec.Struct, frozen=True):
    """One image: a config and layers, the lowest first."""

    config: Descriptor
    layers: list[Descriptor]


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class _Run(msgspec.Struct, frozen=True):
    Env: list[str] | None = None


class _Config(msgspec.Struct, frozen=True):
    architecture: str
    os: str
    rootfs: _RootFs
    variant: str = ""
    config: _Run | None = None


class Image(msgspec.Struct, frozen=True):
    """What is to be unpacked. `digest`: of its manifest, which names all the rest."""

    digest: str
    env: dict[str, str]
    layers: tuple[LayerBlob, ...]


def machine() -> str:
    """This machine's architecture, in the specification's words."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


class Layout:
    """One layout folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ImageRefusedError where it is no layout."""
        self._folder = folder
        self._documents = 0
        version = _converted(self._file(folder / "oci-layout"), dict[str, Any], "oci-layout")
        if not str(version.get("imageLayoutVersion", "")).startswith(_LAYOUT_VERSION):
            raise ImageRefusedError(f"{folder} is no OCI image layout of version 1 (oci-layout)")

    def find(self, ref: str) -> Descriptor:
        """The manifest for this machine: of the image named `ref`, or of the only one there."""
        index = _converted(self._file(self._folder / "index.json"), _Index, "index.json")
        named = [one for one in index.manifests if not ref or one.ref == ref]
        there = ", ".join(sorted({one.ref for one in index.manifests if one.ref})[:_NAMES_TOLD_MAX])
        if not named:
            raise ImageRefusedError(f"the layout has no image named {ref!r} (there: {there})")
        seen: list[str] = []
        found = {one.digest: one for one in self._suited(named, seen, 1)}
        if not found:
            known = ", ".join(sorted(set(seen))[:_NAMES_TOLD_MAX]) or "none"
            raise ImageRefusedError(f"the layout has no image for linux/{machine()} (for: {known})")
        if len(found) > 1:
            raise ImageRefusedError(
                f"the layout has several images; name one, oci:PATH:REF (there: {there})"
            )
        return next(iter(found.values()))

    def _suited(
        self, descriptors: list[Descriptor], seen: list[str], depth: int
    ) -> Iterator[Descriptor]:
        for one in descriptors:
            if one.platform is not None:
                seen.append(f"{one.platform.os}/{one.platform.architecture}")
                if not one.platform.fits:
                    continue
            if one.media_type.endswith(_INDEXES):
                if depth == INDEX_DEPTH_MAX:
                    raise ImageRefusedError(f"indexes lie in indexes, {depth} deep")
                inner = self.document(one, _Index).manifests
                yield from self._suited(inner, seen, depth + 1)
            elif one.media_type.endswith(_MANIFESTS):
                yield one

    def image(self, descriptor: Descriptor) -> Image:
        """The image of a manifest. Raises ImageRefusedError: broken, or for another machine."""
        manifest = self.document(descriptor, Manifest)
        config = self.document(manifest.config, _Config)
        if not Platform(config.architecture, config.os, config.variant).fits:
            raise ImageRefusedError(
                f"it is for {config.os}/{config.architecture}, this is linux/{machine()}"
            )
        names, ids = manifest.layers, config.rootfs.diff_ids
        if len(names) != len(ids):
            raise ImageRefusedError(f"it has {len(names)} layers and {len(ids)} diff_ids")
        if len(names) > LAYERS_MAX:
            raise ImageRefusedError(f"it has {len(names)} layers, at most {LAYERS_MAX}")
        layers = (LayerBlob(self, one, diff) for one, diff in zip(names, ids, strict=True))
        run = config.config or _Run()
        return Image(descriptor.digest, _environment(run.Env or []), tuple(layers))

    def document(self, descriptor: Descriptor, kind: type[_T]) -> _T:
        """A small blob, checked against its digest and read."""
        self._documents += 1
        if self._documents > DOCUMENTS_MAX:
            raise ImageRefusedError(f"it refers to more than {DOCUMENTS_MAX} documents")
        with self.open(descriptor) as file:
            if descriptor.size > DOCUMENT_BYTES_MAX:
                raise ImageRefusedError(f"{descriptor.digest} has {descriptor.size} bytes, as a "
                                        f"document at most {DOCUMENT_BYTES_MAX}")  # fmt: skip
            data = file.read(descriptor.size + 1)
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != descriptor.digest:
            raise ImageRefusedError(f"{descriptor.digest} has other content: it is corrupt")
        return _converted(data, kind, descriptor.digest)

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A blob for reading, not checked but for its size."""
        if not _DIGEST.fullmatch(descriptor.digest):
            raise ImageRefusedError(f"digest {descriptor.digest[:80]!r} is not sha256:<64 digits>")
        path = self._folder / "blobs" / descriptor.digest.replace(":", "/")
        file = _open(path)
        size = os.fstat(file.fileno()).st_size
        if size != descriptor.size:
            file.close()
            raise ImageRefusedError(f"{path} has {size} bytes, not {descriptor.size}")
        return file

    @staticmethod
    def _file(path: Path) -> bytes:
        with _open(path) as file:
            data = file.read(DOCUMENT_BYTES_MAX + 1)
        if len(data) > DOCUMENT_BYTES_MAX:
            raise ImageRefusedError(f"{path} has more than {DOCUMENT_BYTES_MAX} bytes")
        return data


class LayerBlob(msgspec.Struct, frozen=True):
    """One layer of an image."""

    layout: Any
    descriptor: Descriptor
    diff_id: str

    @contextmanager
    def opened(self, budget: Budget) -> Iterator[TarReader]:
        """Its entries; at the end of the block the whole of it was read and has its digests."""
        layout = cast("Layout", self.layout)
        with layout.open(self.descriptor) as file:
            packed = _Hashed(file.read)
            plain = _Hashed(_unpacked(packed, self.descriptor.media_type), budget.spend_bytes)
            try:
                yield TarReader(plain.read)
                plain.drain()
                packed.drain()
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise ImageRefusedError(f"layer {self.descriptor.digest}: {error}") from error
        for found, told in ((packed, self.descriptor.digest), (plain, self.diff_id)):
            if found.digest != told:
                raise ImageRefusedError(f"layer {self.descriptor.digest} is corrupt: its content "
                                        f"has {found.digest}, not {told}")  # fmt: skip


class _Hashed:
    """A stream that hashes and counts what is read from it."""

    def __init__(
        self, read: Callable[[int], bytes], count: Callable[[int], None] = lambda _: None
    ) -> None:
        self._read, self._count = read, count
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._read(size if size >= 0 else _CHUNK)
        self._hash.update(data)
        self._count(len(data))
        return data

    def drain(self) -> None:
        while self.read(_CHUNK):
            continue

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def _unpacked(packed: _Hashed, media_type: str) -> Callable[[int], bytes]:
    """What reads the tar of a layer of this type."""
    if media_type.endswith((".tar+gzip", ".tar.gzip")):
        return gzip.GzipFile(fileobj=cast("BinaryIO", packed), mode="rb").read
    if media_type.endswith((".tar+zstd", ".tar.zstd")):
        return _zstd(packed)
    if media_type.endswith(".tar"):
        return packed.read
    raise ImageRefusedError(f"layers of type {media_type[:120]!r} are not known")


def _zstd(packed: _Hashed) -> Callable[[int], bytes]:
    try:
        zstd: Any = importlib.import_module("compression.zstd")
    except ImportError:
        raise ImageRefusedError(
            "its layers are packed by zstd, which this Python cannot read (3.14 can); "
            "repack them: skopeo copy --dest-compress-format gzip"
        ) from None
    return cast("Callable[[int], bytes]", zstd.ZstdFile(packed, "rb").read)


def _open(path: Path) -> BinaryIO:
    """A regular file; what is none does not make us wait."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageRefusedError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageRefusedError(f"{path} is not a regular file")
    return os.fdopen(fd, "rb")


def _converted(data: bytes, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ImageRefusedError(f"{what} is not as the image specification says: {error}") from None


def _environment(words: list[str]) -> dict[str, str]:
    if sum(len(word.encode()) for word in words) > ENV_BYTES_MAX:
        raise ImageRefusedError(f"its environment has more than {ENV_BYTES_MAX} bytes")
    pairs = (word.partition("=") for word in words)
    env = {name: value for name, equals, value in pairs if name and equals}
    if any("\0" in text for text in (*env, *env.values())):
        raise ImageRefusedError("its environment has a NUL character")
    return env
