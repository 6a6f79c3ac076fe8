"""`commands`: operators' durable intents. One partition: they have one order."""

from dataplane.producer import RecordProducer
from dataplane.records import KafkaRecord
from idl.codec import MSGPACK, decode, encode
from idl.jobs import SourceRef
from idl.records import Command, CommandRecord
from idl.settings import KafkaSettings
from idl.topics import TopicNames


def _encoded(command: Command, by: str, at_ms: int) -> bytes:
    return encode(CommandRecord(by=by, at_ms=at_ms, command=command))


async def send_command(
    producer: RecordProducer, settings: KafkaSettings, command: Command, *, by: str, at_ms: int
) -> SourceRef:
    """Writes a command; returns its place (the leader's `Commanded` names it).

    Raises ConfigError (no topic), PlatformFaultError.
    """
    topic = TopicNames(settings.prefix).commands
    return await producer.produce(topic, _encoded(command, by, at_ms), content_type=MSGPACK)


def send_command_sync(
    producer: RecordProducer, settings: KafkaSettings, command: Command, *, by: str, at_ms: int
) -> SourceRef:
    """`send_command` for tools without a loop."""
    topic = TopicNames(settings.prefix).commands
    return producer.send(topic, _encoded(command, by, at_ms), content_type=MSGPACK).result()


def decode_command(record: KafkaRecord) -> CommandRecord:
    """Raises InvalidRecordError."""
    return decode(record.value, CommandRecord)
