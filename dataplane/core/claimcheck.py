"""Claim check (Hohpe & Woolf, "Enterprise Integration Patterns"): the rule, without Kafka.

Small payloads travel inside the queue record; larger ones are one record of `payloads`, and the
job carries a reference to it. Neither passes through the leader or DDS.
"""

import hashlib

import msgspec

from idl.errors import InvalidRecordError, JobFaultError
from idl.jobs import JobInput, JobSpec, PayloadLocation, PayloadRef, SourceRef
from idl.limits import INPUTS_INLINE_BYTES_MAX, PAYLOAD_BYTES_MAX, PAYLOAD_INLINE_BYTES_MAX

Stored = dict[bytes, PayloadRef]
"""SHA-256 of bytes → where they are in `payloads`."""


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


def large_inputs(spec: JobSpec) -> list[bytes]:
    """Inputs of a job that do not fit beside the smaller ones inside its record."""
    given = [one.data for one in spec.inputs.values() if one.ref is None and one.data]
    left, large = INPUTS_INLINE_BYTES_MAX, []
    for data in sorted(given, key=len):
        left -= len(data)
        if left < 0:
            large.append(data)
    return large


def with_references(spec: JobSpec, stored: Stored) -> JobSpec:
    """The same job, its inputs that are in `stored` by claim check."""
    if not stored or not spec.inputs:
        return spec
    inputs = {name: _checked(given, stored) for name, given in spec.inputs.items()}
    return msgspec.structs.replace(spec, inputs=inputs)


def _checked(given: JobInput, stored: Stored) -> JobInput:
    ref = stored.get(hashlib.sha256(given.data).digest()) if given.data else None
    return given if ref is None else msgspec.structs.replace(given, data=None, ref=ref)


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
            f"payload at {where} has not the {location.size_bytes} bytes that were promised; "
            "submit the job again"
        )
    checked = not location.inline or bool(location.sha256)
    if checked and hashlib.sha256(data).hexdigest() != location.sha256:
        raise PayloadCorruptError(
            f"payload at {where} does not match its SHA-256; submit the job again"
        )
