"""`commands`: operators' durable intents."""

from dataplane.producer import RecordProducer
from dataplane.tail import KafkaRecord
from idl.jobs import SourceRef
from idl.records import Command, CommandRecord
from idl.settings import KafkaSettings


async def send_command(
    producer: RecordProducer, settings: KafkaSettings, command: Command, *, by: str, at_ms: int
) -> SourceRef:
    """Writes a command; returns its place (the leader's `Commanded` names it)."""
    raise NotImplementedError


def send_command_sync(
    producer: RecordProducer, settings: KafkaSettings, command: Command, *, by: str, at_ms: int
) -> SourceRef:
    """`send_command` for tools without a loop."""
    raise NotImplementedError


def decode_command(record: KafkaRecord) -> CommandRecord:
    """Raises InvalidRecordError."""
    raise NotImplementedError
