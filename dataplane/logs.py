"""`logs`: stdout and stderr of attempts, in chunks, capped per attempt."""

from collections.abc import Callable, Iterator
from typing import Literal

from dataplane.producer import RecordProducer
from idl.ids import Attempt, JobId
from idl.jobs import SourceRef
from idl.records import LogChunk
from idl.settings import KafkaSettings

Stream = Literal["stdout", "stderr"]


class AttemptLog:
    """Writes the output of one attempt: numbered chunks, at most LOG_BYTES_MAX in all."""

    def __init__(
        self, producer: RecordProducer, settings: KafkaSettings, job: JobId, attempt: Attempt
    ) -> None:
        raise NotImplementedError

    async def write(self, stream: Stream, data: bytes, at_ms: int) -> None:
        """Sends `data` in chunks of LOG_CHUNK_BYTES; drops what exceeds the cap."""
        raise NotImplementedError

    @property
    def truncated(self) -> bool:
        """Something was dropped."""
        raise NotImplementedError

    @property
    def first(self) -> SourceRef | None:
        """Where the first chunk is (`AttemptResult.log`); None where nothing was written."""
        raise NotImplementedError


def read_logs(
    settings: KafkaSettings,
    job: JobId,
    *,
    attempt: Attempt | None = None,
    start: SourceRef | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[LogChunk]:
    """Chunks of a job in the order written. `start`: where its first chunk is, if known.

    With `stop` it follows: at the end it waits for more until `stop()` is true.
    """
    raise NotImplementedError
