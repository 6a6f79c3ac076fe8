"""The intake: queue, result and command records → events of the core. Bytes become types here.

A record that cannot be read is an event too (with the code of its error): the core rejects it in
the ledger, so the queue moves on and nothing is lost in silence.
"""

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from controlplane.core.events import (
    CommandRead,
    CommandsRead,
    Position,
    ResultRead,
    ResultsRead,
    SetIntake,
    Submission,
    SubmissionsRead,
)
from dataplane.core.claimcheck import location_of
from dataplane.tail import BEGINNING, KafkaRecord, Tail
from idl.codec import decode, decode_spec
from idl.errors import InvalidRecordError, PlatformFaultError
from idl.ids import QueueName
from idl.jobs import SourceRef
from idl.records import AttemptResult, CommandRecord
from idl.settings import KafkaSettings
from idl.topics import TopicNames

IntakeEvent = SubmissionsRead | ResultsRead | CommandsRead
Partitions = tuple[tuple[str, int], ...]
"""(topic, partition) of every stream the leader reads."""


def source_of(record: KafkaRecord) -> SourceRef:
    """Where a record is."""
    return SourceRef(topic=record.topic, partition=record.partition, offset=record.offset)


def key_text(record: KafkaRecord) -> str:
    """The key as text; "" where there is none or it is not UTF-8."""
    try:
        return (record.key or b"").decode()
    except UnicodeDecodeError:
        return ""


def submission_of(record: KafkaRecord, queue: QueueName, payloads_topic: str) -> Submission:
    """One queue record, read or refused."""
    source = source_of(record)
    try:
        spec = decode_spec(record.value, record.content_type)
    except InvalidRecordError as error:
        return Submission(
            source=source,
            queue=queue,
            key=key_text(record),
            timestamp_ms=record.timestamp_ms,
            error_code=error.code,
            error_message=str(error),
        )
    return Submission(
        source=source,
        queue=queue,
        key=key_text(record),
        timestamp_ms=record.timestamp_ms,
        spec=replace(spec, payload=None, payload_ref=None),  # it waits here without its bytes
        payload=location_of(spec, source, payloads_topic),
    )


def result_of(record: KafkaRecord) -> ResultRead:
    """One result record, read or refused."""
    try:
        result = decode(record.value, AttemptResult)
    except InvalidRecordError as error:
        return ResultRead(
            source=source_of(record),
            key=key_text(record),
            error_code=error.code,
            error_message=str(error),
        )
    return ResultRead(source=source_of(record), key=key_text(record), result=result)


def command_of(record: KafkaRecord) -> CommandRead:
    """One command record, read or refused."""
    try:
        command = decode(record.value, CommandRecord)
    except InvalidRecordError as error:
        return CommandRead(
            source=source_of(record), error_code=error.code, error_message=str(error)
        )
    return CommandRead(source=source_of(record), record=command)


class Intake:
    """Reads while its process leads: opened by `OpenIntake`, closed by `CloseIntake`."""

    def __init__(
        self,
        settings: KafkaSettings,
        partitions: Partitions,
        deliver: Callable[[list[IntakeEvent]], None],
        on_error: Callable[[PlatformFaultError], None],
    ) -> None:
        self._settings = settings
        self._names = TopicNames(settings.prefix)
        self._partitions = partitions
        self._deliver = deliver
        self._on_error = on_error
        self._tail: Tail | None = None
        self._warm: Tail | None = None
        """Connected and waiting for `open`: connecting takes longer than an election."""
        self._term = 0
        self._next: dict[tuple[str, int], int] = {}

    def open(self, term: int, positions: tuple[Position, ...]) -> None:
        """Reads from `positions` on; partitions not named there from their beginning."""
        self.close()
        self._term = term
        start = dict.fromkeys(self._partitions, BEGINNING)
        start |= {(p.topic, p.partition): p.next_offset for p in positions}
        self._next = {key: max(0, offset) for key, offset in start.items()}
        self.warm_up()
        self._tail, self._warm = self._warm, None
        if self._tail is not None:
            self._tail.go(start)

    def warm_up(self) -> None:
        """Connects ahead of `open`, if that is not done."""
        if self._warm is not None:
            return
        tail = Tail(
            self._settings,
            dict.fromkeys(self._partitions, BEGINNING),
            lambda records: self._read(tail, records),
            loop=asyncio.get_running_loop(),
            on_error=self._on_error,
            name="intake",
            standby=True,
        )
        tail.start()
        self._warm = tail

    def set(self, order: SetIntake) -> None:
        """Pauses or resumes one stream."""
        if self._tail is None:
            return
        topic = {
            "queue": self._names.queue(QueueName(order.queue)),
            "results": self._names.results,
            "commands": self._names.commands,
        }[order.stream]
        if order.on:
            self._tail.resume(topic)
        else:
            self._tail.pause(topic)

    def close(self) -> None:
        """Stops reading; safe to call at any time."""
        tail, self._tail = self._tail, None
        self._end(tail)

    def end(self) -> None:
        """Stops for good."""
        self.close()
        tail, self._warm = self._warm, None
        self._end(tail)

    @staticmethod
    def _end(tail: Tail | None) -> None:
        if tail is not None:
            asyncio.get_running_loop().run_in_executor(None, tail.close)

    async def backlog(self) -> dict[QueueName, int]:
        """Unread records per queue, on the embedded broker but for the last batch; empty while
        closed. Raises BrokerUnavailableError."""
        if self._tail is None:
            return {}
        unread: dict[QueueName, int] = {}
        for (topic, partition), end in (await self._tail.end_offsets(exact=False)).items():
            queue = self._names.queue_of(topic)
            if queue is not None:
                behind = max(0, end - self._next.get((topic, partition), 0))
                unread[queue] = unread.get(queue, 0) + behind
        return unread

    def _read(self, tail: Tail, records: list[KafkaRecord]) -> None:
        if tail is self._tail:
            for record in records:
                self._next[record.topic, record.partition] = record.offset + 1
            self._deliver(self._events(records))
        tail.done(len(records))

    def _events(self, records: list[KafkaRecord]) -> list[IntakeEvent]:
        submissions: list[Submission] = []
        results: list[ResultRead] = []
        commands: list[CommandRead] = []
        for record in records:
            queue = self._names.queue_of(record.topic)
            if queue is not None:
                submissions.append(submission_of(record, queue, self._names.payloads))
            elif record.topic == self._names.results:
                results.append(result_of(record))
            else:
                commands.append(command_of(record))
        events: list[IntakeEvent] = []
        if submissions:
            events.append(SubmissionsRead(term=self._term, submissions=tuple(submissions)))
        if results:
            events.append(ResultsRead(term=self._term, results=tuple(results)))
        if commands:
            events.append(CommandsRead(term=self._term, commands=tuple(commands)))
        return events
