"""A list of system calls being written down, to be run by ``interpreter.py``.

Arguments are numbers, texts (passed by the address of a NUL-terminated copy), or data. Results
flow by ``store``: the address of a word of another record. Descriptors need no flow: the kernel
hands out
the lowest free number, so ``opens`` knows which it will be.
"""

from __future__ import annotations

import errno
import os
import struct

from node_agent.launcher.interpreter import (
    ARGUMENT,
    EXPECTED,
    IF_EQUAL,
    IF_ERROR,
    LOAD,
    MINUS,
    OTHERWISE,
    RECORD_BYTES,
    STORE,
    WORDS,
)
from node_agent.launcher.kernel import CALLS

_MASK = 2**64 - 1
_NEVER = 2**62  # no result of any call
# Characters told of what failed; JSON may write each as twelve bytes, and one message is 200 KiB.
_TOLD_MAX = 4096


class At:
    """An argument that is the address of data kept before, by its offset."""

    def __init__(self, offset: int) -> None:
        self.offset = offset


class Fault:
    """Where a list ended, and why. Paths in ``what`` may be the job's own, of any length."""

    def __init__(self, step: str, what: str, number: int) -> None:
        self.step, self.errno = step, number
        if len(what) > _TOLD_MAX:
            half = _TOLD_MAX // 2
            what = f"{what[:half]} … {what[-half:]}"
        self.text = f"{what}: {os.strerror(number)}" if number else what


TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    Argument = int | str | bytes | At


class Program:
    """Records and their data, for one address. ``step`` names what the next records belong to."""

    def __init__(self, base: int, sink: int, first_fd: int) -> None:
        """``sink``: address of a word that nobody reads. Descriptors from ``first_fd`` are free."""
        self.base, self._sink = base, sink
        self.step = ""
        self._words: list[int] = []
        self._data = bytearray()
        self._in_data: list[int] = []  # words that are offsets into the data
        self._pointers: list[tuple[int, int]] = []  # words of the data that point into it
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}
        self._told: list[tuple[str, str, tuple[Argument, ...]]] = []  # step and call of each
        self._open: set[int] = set(range(first_fd))

    # --- records ------------------------------------------------------------------------------
    def call(
        self,
        name: str,
        *arguments: Argument,
        store: int = 0,
        expected: int = _NEVER,
        if_equal: str = "",
        if_error: str = "failed",
        otherwise: str = "",
    ) -> int:
        """One system call; labels say where to go on ("": with the next record). Its index."""
        ways = (if_equal, if_error, otherwise)
        return self._record(CALLS[name], name, arguments, store, expected, ways)

    def minus(
        self, left: int, right: int, *, store: int = 0, zero: str = "", otherwise: str = ""
    ) -> int:
        """Stores ``left - right``; goes on at ``zero`` if that is what it is."""
        ways = (zero, "failed", otherwise)
        return self._record(MINUS, "minus", (left, right), store, 0, ways)

    def load(self, address: int, *, store: int, otherwise: str = "") -> int:
        """Copies a word."""
        return self._record(LOAD, "load", (address,), store, _NEVER, ("", "", otherwise))

    def leave(self, number: int) -> int:
        """The end of the list (LEAVE)."""
        return self._record(number, "leave", (), 0, _NEVER, ("", "", ""))

    def label(self, name: str, address: int = 0) -> None:
        """The next record is called so, or what is at ``address``."""
        self._labels[name] = address or self._address(len(self._told), 0)

    def following(self, place: int, ahead: int = 1) -> int:
        """Address of a word of the record after the next one (``ahead`` 0: of the next one)."""
        return self._address(len(self._told) + ahead, place)

    def labelled(self, label: str, place: int) -> int:
        """Address of a word of a record with a label."""
        return self._labels[label] + 8 * place

    def _address(self, index: int, place: int) -> int:
        return self.base + index * RECORD_BYTES + 8 * place

    def _record(
        self,
        number: int,
        name: str,
        arguments: tuple[Argument, ...],
        store: int,
        expected: int,
        ways: tuple[str, str, str],
    ) -> int:
        index, at = len(self._told), len(self._words)
        self._told.append((self.step, name, arguments))
        words = [0] * WORDS
        words[0] = number & _MASK
        for place, argument in enumerate(arguments, ARGUMENT):
            if isinstance(argument, int):
                words[place] = argument & _MASK
            elif isinstance(argument, At):
                words[place] = argument.offset
                self._in_data.append(at + place)
            else:
                words[place] = self.data(_terminated(argument))
                self._in_data.append(at + place)
        words[STORE], words[EXPECTED] = store or self._sink, expected & _MASK
        for place, way in zip((IF_EQUAL, IF_ERROR, OTHERWISE), ways, strict=True):
            words[place] = self.base + (index + 1) * RECORD_BYTES
            if way:
                self._jumps.append((at + place, way))
        self._words += words
        return index

    # --- data ---------------------------------------------------------------------------------
    def data(self, content: bytes) -> int:
        """Keeps bytes, aligned for any use; their offset, which an `At` refers to."""
        self._data += bytes(-len(self._data) % 8)
        self._data += content
        return len(self._data) - len(content)

    def array(self, texts: list[bytes]) -> At:
        """A NULL-terminated array of texts, as execve(2) takes them."""
        offsets = [self.data(text + b"\0") for text in texts]
        at = self.data(bytes(8 * (len(texts) + 1)))
        self._pointers += [(at + 8 * n, offset) for n, offset in enumerate(offsets)]
        return At(at)

    def structure(self, *fields: int | At) -> At:
        """A struct of 64-bit fields."""
        numbers = [field if isinstance(field, int) else 0 for field in fields]
        at = self.data(struct.pack(f"<{len(fields)}Q", *numbers))
        self._pointers += [
            (at + 8 * n, field.offset) for n, field in enumerate(fields) if isinstance(field, At)
        ]
        return At(at)

    # --- descriptors --------------------------------------------------------------------------
    def opens(self, name: str, *arguments: Argument) -> int:
        """A call that returns a descriptor; its number."""
        self.call(name, *arguments)
        fd = next(number for number in range(len(self._open) + 1) if number not in self._open)
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """close(2)."""
        self.call("close", fd)
        self._open.discard(fd)

    # --- the end ------------------------------------------------------------------------------
    def finish(self, bytes_max: int) -> bytes:
        """The list as bytes, to lie at ``base``. Raises OSError if there is no room for it."""
        start = self.base + RECORD_BYTES * len(self._told)
        for at in self._in_data:
            self._words[at] += start
        for at, name in self._jumps:
            self._words[at] = self._labels[name]
        for place, offset in self._pointers:
            struct.pack_into("<Q", self._data, place, start + offset)
        content = struct.pack(f"<{len(self._words)}Q", *self._words) + bytes(self._data)
        if len(content) > bytes_max:
            raise OSError(errno.E2BIG, f"{len(content)} bytes, at most {bytes_max}")
        return content

    def tell(self, record: int) -> tuple[str, str]:
        """Step and call of the record at an address; empty if it is none of ours."""
        index, rest = divmod(record - self.base, RECORD_BYTES)
        if rest or not 0 <= index < len(self._told):
            return "", ""
        step, name, arguments = self._told[index]
        return step, " ".join([name, *(text for text in arguments if isinstance(text, str))])


def blame(lists: list[Program], record: int, result: int) -> Fault:
    """Which call of which list failed, by what the interpreter noted."""
    for one in lists:
        step, what = one.tell(record)
        if step:
            return Fault(step, what, -result)
    return Fault("init", "an unknown system call", errno.EPROTO)


def _terminated(text: str | bytes) -> bytes:
    return (text.encode() if isinstance(text, str) else text) + b"\0"
