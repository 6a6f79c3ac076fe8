"""A stream of tar entries, read strictly: ustar, pax and GNU names, each within its bound.

Our own, because the library's reader takes headers of any size into memory, and follows sizes that
are negative; what the image specification allows is a small part of what tar is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

from node_agent.images.bounds import HEADER_BYTES_MAX, ImageRefusedError

Kind = Literal["file", "hardlink", "symlink", "directory", "other"]

_BLOCK: Final = 512
_CHUNK: Final = 1 << 20
_KINDS: Final[dict[bytes, Kind]] = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink",
    b"3": "other", b"4": "other", b"5": "directory", b"6": "other",
}  # fmt: skip
_SIZE_MAX: Final = 1 << 62
_TIME_MAX: Final = 1 << 40
_LENGTH_DIGITS_MAX: Final = 8
_OCTAL: Final = frozenset(b"01234567")


class Entry(NamedTuple):
    """One entry. `size`: bytes of its body. `kind` other: a device or a FIFO."""

    name: bytes
    kind: Kind
    size: int = 0
    link: bytes = b""
    executable: bool = False
    mtime_s: int = 0


class TarReader:
    """Iterate over the entries; `body` reads what belongs to the one that was last given."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """`read(n)`: up to n bytes of the archive, empty at its end."""
        self._read = read
        self._left = self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        """Raises ImageRefusedError where it is no tar that we take."""
        extended: dict[bytes, bytes] = {}
        while True:
            self._skip()
            header = self._block()
            if header is None:
                return
            kind = header[156:157]
            if kind in (b"x", b"g", b"L", b"K"):
                text = self._whole(_number(header[124:136], "size"))
                if kind == b"x":
                    extended |= _records(text)
                elif kind != b"g":
                    extended[b"path" if kind == b"L" else b"linkpath"] = text.rstrip(b"\0")
                continue
            entry = _entry(header, kind, extended)
            extended = {}
            self._left, self._padding = entry.size, -entry.size % _BLOCK
            yield entry

    def body(self) -> Iterator[bytes]:
        """The body of the entry, in parts."""
        while self._left > 0:
            data = self._read(min(self._left, _CHUNK))
            if not data:
                raise ImageRefusedError("a layer ends within a file")
            self._left -= len(data)
            yield data

    def _skip(self) -> None:
        for _ in self.body():
            continue
        self._left, self._padding = self._padding, 0
        for _ in self.body():
            continue

    def _block(self) -> bytes | None:
        """The next header; None at the end, which is a block of zeros, or no more bytes."""
        data = self._exactly(_BLOCK)
        if not data or not data.strip(b"\0"):
            return None
        told = _number(data[148:156], "checksum")
        if told != sum(data) - sum(data[148:156]) + 8 * ord(" "):
            raise ImageRefusedError("a layer is no tar: the checksum of an entry is wrong")
        return data

    def _whole(self, size: int) -> bytes:
        if size > HEADER_BYTES_MAX:
            raise ImageRefusedError(f"a layer has an extended header of {size} bytes, at most "
                                    f"{HEADER_BYTES_MAX}")  # fmt: skip
        data = self._exactly(size)
        self._exactly(-size % _BLOCK)
        return data

    def _exactly(self, size: int) -> bytes:
        """So many bytes, or none at the archive's end."""
        parts, left = [], size
        while left > 0 and (data := self._read(left)):
            parts.append(data)
            left -= len(data)
        if left and left < size:
            raise ImageRefusedError("a layer ends within a header")
        return b"".join(parts)


def _number(field: bytes, what: str) -> int:
    """Octal digits, or binary with its first bit set; never negative."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40 or value > _SIZE_MAX:
            raise ImageRefusedError(f"a layer has an entry with an impossible {what}")
        return value
    digits = field.strip(b" \0")
    if not _OCTAL.issuperset(digits):
        raise ImageRefusedError(f"a layer has an entry whose {what} is no number")
    return int(digits or b"0", 8)


def _records(text: bytes) -> dict[bytes, bytes]:
    """`<length> <key>=<value>\\n`, one after the other (pax)."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(text):
        space = text.find(b" ", at, at + _LENGTH_DIGITS_MAX + 1)
        digits = text[at : max(space, at)]
        end = at + int(digits) if digits.isdigit() else 0
        if not space < end - 1 < len(text) or text[end - 1 : end] != b"\n":
            raise ImageRefusedError("a layer has a malformed extended header")
        key, equals, value = text[space + 1 : end - 1].partition(b"=")
        at = end
        if not equals:
            raise ImageRefusedError("a layer has a malformed extended header")
        if key.startswith(b"GNU.sparse"):
            raise ImageRefusedError("a layer has a sparse file; write it out in full")
        found[key] = value
    return found


def _entry(header: bytes, kind: bytes, extended: dict[bytes, bytes]) -> Entry:
    if kind not in _KINDS:
        raise ImageRefusedError(f"a layer has an entry of type {kind!r}, which images never have")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    name = extended.get(b"path", name)
    size = _decimal(extended, b"size", _number(header[124:136], "size"))
    mtime_s = _decimal(extended, b"mtime", _number(header[136:148], "time"))
    link = extended.get(b"linkpath", header[157:257].partition(b"\0")[0])
    if b"\0" in name or b"\0" in link:
        raise ImageRefusedError("a layer has an entry with NUL in its name")
    found = _KINDS[kind]
    if found == "file" and name.endswith(b"/"):
        found = "directory"  # as archives of before 1988 have it
    return Entry(
        name,
        found,
        size if found == "file" else 0,
        link,
        bool(_number(header[100:108], "mode") & 0o111),
        min(mtime_s, _TIME_MAX),
    )


def _decimal(extended: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    """A number of an extended header, whole part only."""
    if key not in extended:
        return otherwise
    whole = extended[key].partition(b".")[0]
    if key == b"mtime" and whole.startswith(b"-"):
        return 0
    if not whole.isdigit() or len(whole) > 19 or int(whole) > _SIZE_MAX:
        raise ImageRefusedError(f"a layer has an entry whose {key.decode()} is no number")
    return int(whole)
