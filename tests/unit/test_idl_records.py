"""Records: round trips, evolution, and every way a submission can be wrong."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idl import codec
from idl.errors import InvalidRecordError, LedgerCorruptError
from idl.jobs import Isolation, JobSpec, Limits, PayloadRef, Resources, Retry, SourceRef
from idl.ledger import (
    Assigned,
    Capacity,
    Finished,
    Ingested,
    LedgerEntry,
    NodeSeen,
    Released,
    TermStarted,
)  # fmt: skip
from idl.records import AttemptResult, CancelJob, CommandRecord, DeadLetter, LogChunk, Usage

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
words = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1,
                max_size=20)  # fmt: skip

specs = st.builds(
    JobSpec,
    id=names,
    group=names,
    command=st.lists(words, min_size=1, max_size=4).map(tuple),
    env=st.dictionaries(names, words, max_size=3),
    resources=st.builds(
        Resources,
        cpu_millis=st.integers(10, 64_000),
        memory_bytes=st.integers(8 << 20, 1 << 40),
        gpus=st.integers(0, 8),
    ),
    limits=st.builds(Limits, wall_ms=st.integers(1, 86_400_000), pids_max=st.integers(1, 1000)),
    retry=st.builds(Retry, max_attempts=st.integers(1, 10), backoff_ms=st.integers(0, 10_000)),
    isolation=st.builds(Isolation, network=st.sampled_from(["none", "host"])),
    priority=st.integers(-1000, 1000),
    payload=st.none() | st.binary(max_size=100),
)


@given(specs)
def test_a_spec_survives_both_encodings(spec: JobSpec) -> None:
    assert codec.decode_spec(codec.encode(spec), codec.MSGPACK) == spec
    assert codec.decode_spec(codec.encode_json(spec), codec.JSON) == spec
    assert codec.decode_spec(codec.encode_json(spec)) == spec, "guessed from the first byte"


@pytest.mark.parametrize(
    ("value", "content_type", "code"),
    [
        (None, "", "empty"),
        (b"", "", "empty"),
        (b"{", "", "not-utf8-json"),
        (b'{"command": ["\xff"]}', "", "not-utf8-json"),
        (b"\xc1", "", "not-msgpack"),
        (b"hello", "text/plain", "unknown-content-type"),
        (b'{"v": 2, "command": ["x"]}', "", "unknown-version"),
        (b'{"v": "1", "command": ["x"]}', "", "invalid-spec"),
        (b"{}", "", "invalid-spec"),
        (b'{"command": []}', "", "invalid-spec"),
        (b'{"command": [""]}', "", "invalid-spec"),
        (b'{"command": ["a\\u0000b"]}', "", "invalid-spec"),
        (b'{"command": ["x"], "id": "no/slash"}', "", "invalid-spec"),
        (b'{"command": ["x"], "image": "docker.io/alpine:3"}', "", "invalid-spec"),
        (b'{"command": ["x"], "image": "../alpine"}', "", "invalid-spec"),
        (b'{"command": ["x"], "env": {"A=B": "c"}}', "", "invalid-spec"),
        (b'{"command": ["x"], "resources": {"cpu_millis": 0}}', "", "invalid-spec"),
        (b'{"command": ["x"], "resources": {"memory_bytes": 1}}', "", "invalid-spec"),
        (b'{"command": ["x"], "resources": {"gpus": -1}}', "", "invalid-spec"),
        (b'{"command": ["x"], "limits": {"wall_ms": 0}}', "", "invalid-spec"),
        (b'{"command": ["x"], "retry": {"max_attempts": 0}}', "", "invalid-spec"),
        (b'{"command": ["x"], "retry": {"factor": 0.5}}', "", "invalid-spec"),
        (b'{"command": ["x"], "isolation": {"require": ["luck"]}}', "", "invalid-spec"),
        (b'{"command": ["x"], "isolation": {"profile": "gpu"}}', "", "invalid-spec"),
        (b'{"command": ["x"], "limits": {"cpu_ms": -1}}', "", "invalid-spec"),
        (b'{"command": ["x"], "limits": {"open_files_max": 1}}', "", "invalid-spec"),
        (b'{"command": ["x"], "outputs": ["../x"]}', "", "invalid-spec"),
        (b'{"command": ["x"], "inputs": {"/x": {"data": "aGk="}}}', "", "invalid-spec"),
        (b'{"command": ["x"], "inputs": {"x": {}}}', "", "invalid-spec"),
        (b'{"command": ["x"], "inputs": {"x": {"data": "' + b"aGFo" * 3000 + b'"}}}', "",
         "too-large"),
        (b'{"command": ["x"], "payload": "aGk=", "payload_ref": '
         b'{"partition": 0, "offset": 0, "size_bytes": 2, "sha256": ""}}', "", "invalid-spec"),
        (b'{"command": ["' + b"x" * 70_000 + b'"]}', "", "too-large"),
    ],
)  # fmt: skip
def test_a_bad_submission_has_a_stable_code(
    value: bytes | None, content_type: str, code: str
) -> None:
    with pytest.raises(InvalidRecordError) as caught:
        codec.decode_spec(value, content_type)
    assert caught.value.code == code
    assert str(caught.value)


def test_unknown_fields_are_kept_out_of_the_way() -> None:
    spec = codec.decode_spec(b'{"command": ["x"], "colour": "blue", "resources": {"tpu": 1}}')
    assert spec.command == ("x",)


class _JobSpecNext(JobSpec, frozen=True, kw_only=True, omit_defaults=True):
    """The same version with a field more, as a newer SDK would send it."""

    deadline_ms: int = 0


def test_older_and_newer_specs_read_each_other() -> None:
    newer = _JobSpecNext(command=("x",), deadline_ms=5)
    assert codec.decode_spec(codec.encode(newer)).command == ("x",)
    older = msgspec.msgpack.decode(codec.encode(JobSpec(command=("x",))), type=_JobSpecNext)
    assert older.deadline_ms == 0


class _NodeSeenBefore(msgspec.Struct, frozen=True, kw_only=True, tag="node_seen", tag_field="t"):
    """A node as versions before images wrote and read it."""

    node: str
    incarnation: int
    capacity: Capacity
    enforces: tuple[str, ...]


def test_versions_before_images_read_and_are_read() -> None:
    spec = codec.decode_spec(codec.encode(JobSpec(command=("x",), image="alpine")))
    assert spec.image == "alpine" and "image" not in str(codec.encode(JobSpec(command=("x",))))
    capacity = Capacity(cpu_millis=1, memory_bytes=2)
    before = _NodeSeenBefore(node="n", incarnation=1, capacity=capacity, enforces=("cpu",))
    now = NodeSeen(
        node="n", incarnation=1, capacity=capacity, enforces=("cpu",), images={"a": "directory"}
    )
    assert msgspec.msgpack.decode(codec.encode(now), type=_NodeSeenBefore) == before
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=NodeSeen)
    assert read.images == {} and read.node == "n"


SOURCE = SourceRef(topic="queue.default", partition=0, offset=4)
ENTRY = LedgerEntry(
    term=2, leader="c1", incarnation=5, seq=1, at_ms=9,
    decisions=(
        TermStarted(pool="main", previous_term=1),
        NodeSeen(node="n1", incarnation=1, capacity=Capacity(cpu_millis=1, memory_bytes=2),
                 enforces=("memory",)),
        Ingested(queue="default", source=SOURCE, job=JobSpec(id="a", command=("x",))),
        Assigned(job="a", attempt=1, node="n1", incarnation=1),
        Released(job="a", attempt=1, outcome="succeeded", source=SOURCE),
        Finished(job="a", attempt=1),
    ),
)  # fmt: skip


def test_a_ledger_entry_survives() -> None:
    assert codec.decode_entry(0, codec.encode(ENTRY)) == ENTRY


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"\xc1",
        codec.encode(ENTRY)[:-1],
        msgspec.msgpack.encode({"v": 2}),
        msgspec.msgpack.encode({**msgspec.to_builtins(ENTRY), "decisions": [{"t": "granted"}]}),
    ],
)
def test_an_unreadable_ledger_entry_stops_the_reader(value: bytes | None) -> None:
    with pytest.raises(LedgerCorruptError, match="offset 7"):
        codec.decode_entry(7, value)


@pytest.mark.parametrize(
    "record",
    [
        AttemptResult(job="a", attempt=1, node="n", term=1, outcome="failed", exit_code=3,
                      usage=Usage(wall_ms=5), result=b"\0\xff",
                      result_ref=PayloadRef(partition=0, offset=1, size_bytes=2, sha256="x")),
        LogChunk(job="a", attempt=1, seq=0, stream="stdout", at_ms=1, data=b"\xff"),
        CommandRecord(command=CancelJob(job="a")),
        DeadLetter(key="a", queue="q", job="a", code="c", reason="r", at_ms=1, source=SOURCE),
    ],
)  # fmt: skip
def test_other_records_survive_both_encodings(record: msgspec.Struct) -> None:
    assert codec.decode(codec.encode(record), type(record)) == record
    assert codec.decode(codec.encode_json(record), type(record)) == record
    raised = {**msgspec.to_builtins(record), "v": 9}
    with pytest.raises(InvalidRecordError, match="version 9"):
        codec.decode(msgspec.json.encode(raised), type(record))
