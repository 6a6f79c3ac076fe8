"""`results`: one record per attempt; large result bytes go by claim check."""

from dataplane.payloads import PayloadFetcher
from dataplane.producer import RecordProducer
from idl.jobs import SourceRef
from idl.records import AttemptResult
from idl.settings import KafkaSettings


async def write_result(
    producer: RecordProducer, settings: KafkaSettings, result: AttemptResult
) -> SourceRef:
    """Writes the record and returns its place. `result.result` above RESULT_INLINE_BYTES_MAX is
    moved to `payloads` first. Raises JobFaultError above RESULT_BYTES_MAX, PlatformFaultError."""
    raise NotImplementedError


def read_result(settings: KafkaSettings, source: SourceRef) -> AttemptResult:
    """The record at `source`. Raises InvalidRecordError, PlatformFaultError."""
    raise NotImplementedError


async def result_bytes(
    result: AttemptResult, settings: KafkaSettings, fetcher: PayloadFetcher
) -> bytes | None:
    """The job's own result bytes, wherever they are; None where it wrote none."""
    raise NotImplementedError
