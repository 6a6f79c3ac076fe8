"""`dead-letter`: what ended without a result, with its whole story."""

from collections.abc import Iterator

from dataplane.producer import RecordProducer
from idl.jobs import SourceRef
from idl.records import DeadLetter
from idl.settings import KafkaSettings


async def write_dead_letter(
    producer: RecordProducer, settings: KafkaSettings, letter: DeadLetter
) -> SourceRef:
    """Writes the record; key = `letter.key`. An original too large for one record is left out
    (`source` names it). Raises PlatformFaultError."""
    raise NotImplementedError


def read_dead_letters(settings: KafkaSettings) -> Iterator[tuple[SourceRef, DeadLetter]]:
    """All of them, oldest first; a duplicate key is yielded once (writers may repeat)."""
    raise NotImplementedError


def fetch_original(settings: KafkaSettings, source: SourceRef) -> tuple[bytes | None, str]:
    """The submission at `source` and its content type; None where Kafka no longer holds it."""
    raise NotImplementedError
