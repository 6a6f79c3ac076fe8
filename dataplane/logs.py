"""`logs`: stdout and stderr of attempts, in chunks, capped per attempt."""

from collections.abc import Callable, Iterator
from typing import Literal

from confluent_kafka import murmur2

from dataplane.producer import RecordProducer
from dataplane.read import read_range, require_partitions
from dataplane.records import BEGINNING
from idl.codec import MSGPACK, decode, encode
from idl.ids import Attempt, JobId
from idl.jobs import SourceRef
from idl.limits import LOG_BYTES_MAX, LOG_CHUNK_BYTES
from idl.records import LogChunk
from idl.settings import KafkaSettings
from idl.topics import TopicNames

Stream = Literal["stdout", "stderr"]
METADATA_TIMEOUT_S = 5.0


class AttemptLog:
    """Writes the output of one attempt: numbered chunks, at most `bytes_max` in all.

    One writer at a time: calls of `write` must not overlap.
    """

    def __init__(
        self,
        producer: RecordProducer,
        settings: KafkaSettings,
        job: JobId,
        attempt: Attempt,
        bytes_max: int = LOG_BYTES_MAX,
    ) -> None:
        self._producer = producer
        self._bytes_max = bytes_max
        self._topic = TopicNames(settings.prefix).logs
        self._job = job
        self._attempt = attempt
        self._seq = 0
        self._written = 0
        self._dropped = 0
        self._first: SourceRef | None = None

    async def write(self, stream: Stream, data: bytes, at_ms: int) -> None:
        """Sends `data` in chunks of LOG_CHUNK_BYTES; drops what exceeds the cap.

        Raises PlatformFaultError where Kafka does not take it.
        """
        kept = data[: max(0, self._bytes_max - self._written)]
        self._dropped += len(data) - len(kept)
        self._written += len(kept)
        for start in range(0, len(kept), LOG_CHUNK_BYTES):
            await self._send(stream, kept[start : start + LOG_CHUNK_BYTES], at_ms)

    async def _send(self, stream: Stream, data: bytes, at_ms: int) -> None:
        chunk = LogChunk(
            job=self._job,
            attempt=self._attempt,
            seq=self._seq,
            stream=stream,
            at_ms=at_ms,
            data=data,
        )
        self._seq += 1
        place = await self._producer.produce(
            self._topic, encode(chunk), key=self._job, content_type=MSGPACK
        )
        self._first = self._first or place

    @property
    def truncated(self) -> bool:
        """Something was dropped."""
        return self._dropped > 0

    @property
    def first(self) -> SourceRef | None:
        """Where the first chunk is (`AttemptResult.log`); None where nothing was written."""
        return self._first


def read_logs(
    settings: KafkaSettings,
    job: JobId,
    *,
    attempt: Attempt | None = None,
    start: SourceRef | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[LogChunk]:
    """Chunks of a job in the order written, each once. `start`: where its first chunk is.

    Without `start` the job's whole partition is read. With `stop` it follows: at the end it
    waits for more until `stop()` is true. Raises ConfigError (no topic), PlatformFaultError.
    """
    topic = TopicNames(settings.prefix).logs
    partition = start.partition if start else _partition_of(settings, topic, job)
    first = start.offset if start else BEGINNING
    seen: set[tuple[int, int]] = set()
    for record in read_range(settings, topic, partition, first, stop=stop):
        if record.key != job.encode():
            continue
        chunk = decode(record.value, LogChunk)
        known = (chunk.attempt, chunk.seq)
        if known not in seen and (attempt is None or chunk.attempt == attempt):
            seen.add(known)
            yield chunk


def _partition_of(settings: KafkaSettings, topic: str, job: JobId) -> int:
    """Where our producers (and Java's) put this key: murmur2, as Kafka's default partitioner."""
    return murmur2(job.encode(), require_partitions(settings, topic, METADATA_TIMEOUT_S))
