"""`results`: one record per attempt; large result bytes go by claim check."""

import msgspec

from dataplane.core.claimcheck import needs_claim_check
from dataplane.payloads import PayloadFetcher, put_payload
from dataplane.producer import RecordProducer
from dataplane.read import read_one
from idl.codec import MSGPACK, decode, encode
from idl.errors import JobFaultError
from idl.jobs import PayloadLocation, PayloadRef, SourceRef
from idl.limits import RESULT_BYTES_MAX, RESULT_INLINE_BYTES_MAX
from idl.records import AttemptResult, OutputFile
from idl.settings import KafkaSettings
from idl.topics import TopicNames


async def write_result(
    producer: RecordProducer, settings: KafkaSettings, result: AttemptResult
) -> SourceRef:
    """Writes the record and returns its place. `result.result` above RESULT_INLINE_BYTES_MAX is
    moved to `payloads` first. Raises JobFaultError above RESULT_BYTES_MAX, PlatformFaultError."""
    topics = TopicNames(settings.prefix)
    data = result.result
    if data is not None and len(data) > RESULT_BYTES_MAX:
        raise JobFaultError(
            f"job {result.job} wrote a result of {len(data)} bytes, at most {RESULT_BYTES_MAX}; "
            "put larger output into an object store and write its address"
        )
    if data is not None and needs_claim_check(len(data), RESULT_INLINE_BYTES_MAX):
        ref = await put_payload(producer, topics.payloads, result.job, data)
        result = msgspec.structs.replace(result, result=None, result_ref=ref)
    return await producer.produce(
        topics.results, encode(result), key=result.job, content_type=MSGPACK
    )


def read_result(settings: KafkaSettings, source: SourceRef) -> AttemptResult:
    """The record at `source`. Blocks. Raises JobFaultError (no such record, not a result),
    PlatformFaultError."""
    record = read_one(settings, source.topic, source.partition, source.offset)
    if record is None:
        raise JobFaultError(
            f"no result at {source.topic}[{source.partition}]@{source.offset}: "
            "Kafka no longer keeps it"
        )
    return decode(record.value, AttemptResult)


def output_location(output: OutputFile, settings: KafkaSettings) -> PayloadLocation | None:
    """Where the bytes of a collected file are; None where the record holds them itself."""
    return None if output.ref is None else _location(output.ref, settings)


def output_bytes_sync(
    output: OutputFile, settings: KafkaSettings, fetcher: PayloadFetcher
) -> bytes:
    """A collected file, checked against its SHA-256. Raises as `PayloadFetcher.fetch`."""
    location = output_location(output, settings)
    return (output.data or b"") if location is None else fetcher.fetch_sync(location)


def result_location(result: AttemptResult, settings: KafkaSettings) -> PayloadLocation | None:
    """Where the claim-checked bytes of a result are; None where there are none."""
    return None if result.result_ref is None else _location(result.result_ref, settings)


def _location(ref: PayloadRef, settings: KafkaSettings) -> PayloadLocation:
    topic = TopicNames(settings.prefix).payloads
    return PayloadLocation(
        source=SourceRef(topic=topic, partition=ref.partition, offset=ref.offset),
        size_bytes=ref.size_bytes,
        inline=False,
        sha256=ref.sha256,
    )


async def result_bytes(
    result: AttemptResult, settings: KafkaSettings, fetcher: PayloadFetcher
) -> bytes | None:
    """The job's own result bytes, wherever they are; None where it wrote none.

    Raises as `PayloadFetcher.fetch`.
    """
    location = result_location(result, settings)
    return result.result if location is None else await fetcher.fetch(location)


def result_bytes_sync(
    result: AttemptResult, settings: KafkaSettings, fetcher: PayloadFetcher
) -> bytes | None:
    """`result_bytes` for tools without a loop."""
    location = result_location(result, settings)
    return result.result if location is None else fetcher.fetch_sync(location)
