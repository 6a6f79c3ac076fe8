"""DDS types. Hand-written: the wheel's `idlc` crashes (facts). `idl/outrider.idl` says the same in
IDL and a test holds the two together.

One envelope for all topics: serialising nested structs in Python costs 20 times more than a string
(facts/dds.md), so the body is JSON text.
"""

import struct
from dataclasses import dataclass
from typing import Any, Final

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.annotations import appendable
from cyclonedds.idl.annotations import key as dds_key
from cyclonedds.idl.types import int64

from idl.envelope import Message

_D_CDR2_LE: Final = b"\x00\x09\x00\x00"
"""Encapsulation header of an appendable type in XCDR version 2, little endian (DDS-XTypes 1.3,
7.6.2.1.2): what Cyclone writes on every machine of ours."""
_WORD: Final = 4
"""XCDR2 aligns to at most 4 bytes, and every field here to no less."""


@dataclass
@appendable
class Envelope(IdlStruct, typename="outrider.Envelope"):
    """`idl.envelope.Message` without its topic, which is the DDS topic it travels on."""

    key: str
    dds_key("key")
    sender: str
    incarnation: int64
    principal: str
    term: int64
    seq: int64
    at_ms: int64
    tag: str
    body: str

    def serialize(
        self, buffer: Any = None, endianness: Any = None, use_version_2: bool | None = None
    ) -> bytes:
        """The wheel's own serialiser, in a ninth of its time for the one encoding in use: a test
        holds the two together, and everything else goes through it."""
        if buffer is not None or endianness is not None or use_version_2 is False:
            return super().serialize(buffer, endianness, use_version_2)
        body = self.body.encode() + b"\0"
        data = b"".join(
            (
                _text(self.key), _text(self.sender), _number(self.incarnation),
                _text(self.principal), _number(self.term), _number(self.seq),
                _number(self.at_ms), _text(self.tag), len(body).to_bytes(_WORD, "little"), body,
            )
        )  # fmt: skip
        return _D_CDR2_LE + len(data).to_bytes(_WORD, "little") + data

    @classmethod
    def deserialize(
        cls, data: bytes, has_header: bool = True, use_version_2: bool | None = None
    ) -> "Envelope":
        """As `serialize`. Bytes that are no envelope become an empty one, which nobody signed:
        a stranger must not be able to stop the reading thread."""
        try:
            if not has_header or data[:_WORD] != _D_CDR2_LE:
                return super().deserialize(data, has_header, use_version_2)
            return _read(data)
        except Exception:  # noqa: BLE001 - the wheel raises bare ones, too
            return cls("", "", 0, "", 0, 0, 0, "", "")

    @classmethod
    def deserialize_key(cls, *_data: Any, **_how: Any) -> "Envelope":
        """Of a sample without data (its writer left): nobody looks at it, and its bytes are as much
        a stranger's as those of any other."""
        return cls("", "", 0, "", 0, 0, 0, "", "")


_number: Final = struct.Struct("<q").pack


def _text(text: str) -> bytes:
    """Length with the closing NUL, the bytes, the NUL, and padding to a whole word."""
    data = text.encode()
    size = len(data) + 1
    return size.to_bytes(_WORD, "little") + data + b"\0" * (1 + -size % _WORD)


def _read(data: bytes) -> Envelope:
    """Fields in order; what a newer version appended is left unread."""
    at = 2 * _WORD  # encapsulation header, size

    def text() -> str:
        nonlocal at
        size = int.from_bytes(data[at : at + _WORD], "little")
        start = at + _WORD
        if not 0 < size <= len(data) - start:
            raise ValueError("a string is longer than its message")
        at = start + size + -size % _WORD
        return data[start : start + size - 1].decode()

    def number() -> int:
        nonlocal at
        at += 8
        value: int = struct.unpack_from("<q", data, at - 8)[0]
        return value

    return Envelope(
        key=text(), sender=text(), incarnation=number(), principal=text(), term=number(),
        seq=number(), at_ms=number(), tag=text(), body=text(),
    )  # fmt: skip


def to_wire(message: Message) -> Envelope:
    """Message → DDS sample."""
    return Envelope(
        key=message.key, sender=message.sender, incarnation=message.incarnation,
        principal=message.principal, term=message.term, seq=message.seq, at_ms=message.at_ms,
        tag=message.tag, body=message.body,
    )  # fmt: skip


def from_wire(topic: str, sample: Envelope) -> Message:
    """DDS sample → Message. Nothing is believed yet: see `idl.envelope.Opener`."""
    return Message(
        topic=topic, key=sample.key, sender=sample.sender, incarnation=sample.incarnation,
        principal=sample.principal, term=sample.term, seq=sample.seq, at_ms=sample.at_ms,
        tag=sample.tag, body=sample.body,
    )  # fmt: skip
