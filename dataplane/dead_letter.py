"""`dead-letter`: what ended without a result, with its whole story."""

from collections.abc import Iterator

import msgspec

from dataplane.producer import RecordProducer
from dataplane.read import read_one, scan
from idl.codec import MSGPACK, decode, encode
from idl.jobs import SourceRef
from idl.limits import KAFKA_RECORD_BYTES_MAX
from idl.records import DeadLetter
from idl.settings import KafkaSettings
from idl.topics import TopicNames
from idl.units import KIB

OVERHEAD_BYTES = 4 * KIB
"""Room for key, headers and batch framing within KAFKA_RECORD_BYTES_MAX."""


async def write_dead_letter(
    producer: RecordProducer, settings: KafkaSettings, letter: DeadLetter
) -> SourceRef:
    """Writes the record; key = `letter.key`. An original too large to fit with its story is left
    out (`source` still names it). Raises PlatformFaultError."""
    data = encode(letter)
    if len(data) > KAFKA_RECORD_BYTES_MAX - OVERHEAD_BYTES:
        data = encode(msgspec.structs.replace(letter, original=None))
    topic = TopicNames(settings.prefix).dead_letter
    return await producer.produce(topic, data, key=letter.key, content_type=MSGPACK)


def read_dead_letters(settings: KafkaSettings) -> Iterator[tuple[SourceRef, DeadLetter]]:
    """All of them, oldest first, each once (a new leader may write one again). A key is a job's id,
    which later jobs may bear: `source` tells them apart.

    Raises ConfigError (no topic), InvalidRecordError, PlatformFaultError.
    """
    seen: set[tuple[str, SourceRef]] = set()
    for record in scan(settings, TopicNames(settings.prefix).dead_letter):
        letter = decode(record.value, DeadLetter)
        if (letter.key, letter.source) not in seen:
            seen.add((letter.key, letter.source))
            yield record.source, letter


def fetch_original(settings: KafkaSettings, source: SourceRef) -> tuple[bytes | None, str]:
    """The submission at `source` and its content type; None where Kafka no longer holds it.

    Blocks. Raises PlatformFaultError.
    """
    record = read_one(settings, source.topic, source.partition, source.offset)
    return (None, "") if record is None else (record.value, record.content_type)
