"""Claim check (Hohpe & Woolf, "Enterprise Integration Patterns"): the rule, without Kafka.

Small payloads travel inside the queue record; larger ones are one record of `payloads`, and the
job carries a reference to it. Neither passes through the leader or DDS.
"""

import hashlib

from idl.errors import InvalidRecordError, JobFaultError
from idl.jobs import JobSpec, PayloadLocation, PayloadRef, SourceRef
from idl.limits import PAYLOAD_BYTES_MAX, PAYLOAD_INLINE_BYTES_MAX


class PayloadMissingError(JobFaultError):
    """No record is where the reference points: never written, or Kafka no longer keeps it."""


class PayloadCorruptError(JobFaultError):
    """The bytes at the reference are not the bytes it promises (size or SHA-256)."""


def needs_claim_check(size_bytes: int, inline_max: int = PAYLOAD_INLINE_BYTES_MAX) -> bool:
    """Whether bytes of this size go to `payloads`. Raises InvalidRecordError above the maximum."""
    if size_bytes > PAYLOAD_BYTES_MAX:
        raise InvalidRecordError(
            "too-large",
            f"payload has {size_bytes} bytes, at most {PAYLOAD_BYTES_MAX}; "
            "put larger input into an object store and send its address",
        )
    return size_bytes > inline_max


def reference(data: bytes, partition: int, offset: int) -> PayloadRef:
    """The claim check for `data` stored at this place of `payloads`."""
    return PayloadRef(
        partition=partition,
        offset=offset,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def location_of(spec: JobSpec, source: SourceRef, payloads_topic: str) -> PayloadLocation | None:
    """Where an agent will find the payload of a job submitted as record `source`.

    None: the job has no payload. Inline payloads carry no SHA-256: Kafka's own CRC covers them.
    """
    if spec.payload_ref is not None:
        ref = spec.payload_ref
        place = SourceRef(topic=payloads_topic, partition=ref.partition, offset=ref.offset)
        return PayloadLocation(
            source=place, size_bytes=ref.size_bytes, inline=False, sha256=ref.sha256
        )
    if spec.payload is not None:
        return PayloadLocation(source=source, size_bytes=len(spec.payload), inline=True)
    return None


def verify(data: bytes, location: PayloadLocation) -> None:
    """Raises PayloadCorruptError unless `data` is what `location` promises."""
    where = f"{location.source.topic}[{location.source.partition}]@{location.source.offset}"
    if len(data) != location.size_bytes:
        raise PayloadCorruptError(
            f"payload at {where} has {len(data)} bytes where {location.size_bytes} were promised; "
            "submit the job again"
        )
    if location.sha256 and hashlib.sha256(data).hexdigest() != location.sha256:
        raise PayloadCorruptError(
            f"payload at {where} does not match its SHA-256; submit the job again"
        )
