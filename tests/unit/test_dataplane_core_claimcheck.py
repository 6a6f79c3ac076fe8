"""The claim-check rule: when, where, and how it is verified."""

import hashlib

import msgspec
import pytest

from dataplane.core.claimcheck import (
    PayloadCorruptError,
    large_inputs,
    location_of,
    needs_claim_check,
    reference,
    verify,
    with_references,
)
from idl.errors import InvalidRecordError
from idl.jobs import JobInput, JobSpec, PayloadRef, SourceRef
from idl.limits import INPUTS_INLINE_BYTES_MAX, PAYLOAD_BYTES_MAX, PAYLOAD_INLINE_BYTES_MAX

SOURCE = SourceRef(topic="queue.q", partition=1, offset=7)
SPEC = JobSpec(command=("true",))


@pytest.mark.parametrize(
    ("size", "needed"),
    [(0, False), (PAYLOAD_INLINE_BYTES_MAX, False), (PAYLOAD_INLINE_BYTES_MAX + 1, True),
     (PAYLOAD_BYTES_MAX, True)],
)  # fmt: skip
def test_when(size: int, needed: bool) -> None:
    assert needs_claim_check(size) is needed


def test_too_large_says_where_to_put_it() -> None:
    with pytest.raises(InvalidRecordError, match="object store") as caught:
        needs_claim_check(PAYLOAD_BYTES_MAX + 1)
    assert caught.value.code == "too-large"


def test_where() -> None:
    assert location_of(SPEC, SOURCE, "payloads") is None
    inline = location_of(msgspec.structs.replace(SPEC, payload=b"abc"), SOURCE, "payloads")
    assert inline is not None
    assert (inline.source, inline.size_bytes, inline.inline) == (SOURCE, 3, True)
    ref = reference(b"abc", 2, 9)
    assert ref.sha256 == hashlib.sha256(b"abc").hexdigest()
    checked = location_of(msgspec.structs.replace(SPEC, payload_ref=ref), SOURCE, "p.payloads")
    assert checked is not None and not checked.inline
    assert checked.source == SourceRef(topic="p.payloads", partition=2, offset=9)
    verify(b"abc", checked)
    verify(b"abc", inline)
    for wrong in (b"abcd", b"abd"):
        with pytest.raises(PayloadCorruptError, match=r"p\.payloads\[2\]@9"):
            verify(wrong, checked)


def test_empty_payload_is_a_payload() -> None:
    found = location_of(msgspec.structs.replace(SPEC, payload=b""), SOURCE, "payloads")
    assert found is not None and found.size_bytes == 0
    verify(b"", found)


def test_the_largest_inputs_go_by_claim_check_and_the_rest_stay() -> None:
    sizes = {"a": 1000, "b": INPUTS_INLINE_BYTES_MAX - 1000, "c": 1, "d": 5000}
    inputs = {name: JobInput(data=name.encode() * size) for name, size in sizes.items()}
    spec = JobSpec(command=("x",), inputs=inputs)
    large = large_inputs(spec)
    assert [data[:1] for data in large] == [b"b"]
    ref = PayloadRef(partition=0, offset=7, size_bytes=len(large[0]), sha256="s")
    checked = with_references(spec, {hashlib.sha256(large[0]).digest(): ref})
    assert checked.inputs["b"] == JobInput(ref=ref)
    assert checked.inputs["a"] == inputs["a"]
    assert large_inputs(checked) == []
    assert large_inputs(JobSpec(command=("x",))) == []
