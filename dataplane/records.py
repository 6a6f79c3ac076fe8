"""One Kafka record as read, typed once at the edge."""

from typing import Final, NamedTuple

import msgspec
from confluent_kafka import Message

from idl.codec import CONTENT_TYPE_HEADER
from idl.jobs import SourceRef

BEGINNING: Final = -2
END: Final = -1
"""Positions that Kafka resolves: the first record that is kept; the next one to be written."""


class Partition(NamedTuple):
    """A topic's partition; equal to the plain tuple."""

    topic: str
    partition: int


class KafkaRecord(msgspec.Struct, frozen=True):
    """One record as read. `timestamp_ms`: broker or producer time, epoch ms (0: none)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    content_type: str = ""
    timestamp_ms: int = 0

    @property
    def source(self) -> SourceRef:
        """Its place, as other records refer to it."""
        return SourceRef(topic=self.topic, partition=self.partition, offset=self.offset)


def record_of(message: Message) -> KafkaRecord:
    """A message without error → a record."""
    return KafkaRecord(
        message.topic() or "",
        message.partition() or 0,
        message.offset() or 0,
        message.key(),
        message.value(),
        _content_type(message),
        max(0, message.timestamp()[1]),
    )


def _content_type(message: Message) -> str:
    found = message.headers()
    if not found:
        return ""
    for name, value in found.items() if isinstance(found, dict) else found:
        if name == CONTENT_TYPE_HEADER and value is not None:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return ""
