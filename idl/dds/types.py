"""DDS types. Hand-written: the wheel's `idlc` crashes (facts). `idl/outrider.idl` says the same in
IDL and a test holds the two together.

One envelope for all topics: serialising nested structs in Python costs 20 times more than a string
(facts/dds.md), so the body is JSON text.
"""

from dataclasses import dataclass

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.annotations import appendable
from cyclonedds.idl.annotations import key as dds_key
from cyclonedds.idl.types import int64

from idl.envelope import Message


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
