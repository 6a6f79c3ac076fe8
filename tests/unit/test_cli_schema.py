"""The published JSON Schema says what the code accepts, and the examples are valid by both."""

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import msgspec
import pytest
import yaml

from idl.codec import decode_spec, encode_json
from idl.errors import InvalidRecordError
from idl.jobs import JobSpec, PayloadRef, validate_spec
from idl.schema import BOUNDS, JOB_SCHEMA_FILE, job_schema, job_schema_text
from outrider.client.jobfile import read_job_file

EXAMPLES = Path(__file__).parents[2] / "examples"
VALIDATOR = jsonschema.Draft202012Validator(job_schema())


def test_the_file_is_what_the_code_generates() -> None:
    assert JOB_SCHEMA_FILE.read_text() == job_schema_text(), "run `python -m idl.schema`"
    jsonschema.Draft202012Validator.check_schema(job_schema())


def with_value(struct: str, field: str, value: int) -> dict[str, Any]:
    job: dict[str, Any] = {"command": ["x"]}
    if struct == "JobSpec":
        return job | {field: value}
    if struct == "PayloadRef":
        return job | {"payload_ref": msgspec.to_builtins(_REF) | {field: value}}
    return job | {struct.lower(): {field: value}}


_REF = PayloadRef(partition=0, offset=0, size_bytes=1, sha256="ab" * 32)


def accepted(job: dict[str, Any]) -> bool:
    try:
        validate_spec(msgspec.convert(job, JobSpec))
    except InvalidRecordError:
        return False
    return True


@pytest.mark.parametrize(("struct", "field"), BOUNDS)
def test_bounds_are_those_of_the_code(struct: str, field: str) -> None:
    low, high = BOUNDS[struct, field]
    for value, good in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
        job = with_value(struct, field, value)
        assert accepted(job) is good, (field, value)
        assert VALIDATOR.is_valid(job) is good, (field, value)


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"command": []},
        {"command": "echo"},
        {"command": ["x"], "id": "a b"},
        {"command": ["x"], "group": "-a"},
        {"command": ["x"], "env": {"A": 1}},
        {"command": ["x"], "isolation": {"network": "wifi"}},
        {"command": ["x"] * 1025},
    ],
)
def test_what_one_refuses_the_other_refuses(job: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(job)
    with pytest.raises(InvalidRecordError):
        decode_spec(json.dumps(job).encode())


def test_unknown_fields_are_tolerated_by_both() -> None:
    job = {"command": ["x"], "from_the_future": 1}
    assert VALIDATOR.is_valid(job)
    assert decode_spec(json.dumps(job).encode()).command == ("x",)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_wire_examples_are_valid_by_schema_and_code(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text()))
    decode_spec(path.read_bytes(), "application/json")


@pytest.mark.parametrize(
    "path",
    sorted([*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("*.jsonl")]),
    ids=lambda path: path.name,
)
def test_job_file_examples_become_valid_records(path: Path) -> None:
    for submission in read_job_file(path):
        record = encode_json(submission.spec)
        VALIDATOR.validate(json.loads(record))
        assert decode_spec(record, "application/json") == submission.spec


def test_the_examples_are_there() -> None:
    assert {path.suffix for path in EXAMPLES.iterdir()} >= {".json", ".yaml", ".jsonl", ".py"}
    assert yaml.safe_load((EXAMPLES / "jobs.yaml").read_text())
