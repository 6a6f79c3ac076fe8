"""`Job` and its way to the wire form; functions as jobs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from idl.codec import decode_spec, encode
from idl.errors import ConfigError, InvalidRecordError
from idl.jobs import JobSpec
from idl.limits import PAYLOAD_BYTES_MAX
from outrider.client.function import function_jobs, function_source, function_value
from outrider.client.job import (
    REQUIRED_DEFAULT,
    Job,
    array,
    identified,
    new_job_id,
    required_limits,
    shebang_command,
)

BAD = os.fsdecode(b"\xff")
"""A word of a command line that is not UTF-8, as Python has it."""


def test_a_job_without_options_is_the_spec_without_options() -> None:
    assert Job(["true"]).submission().spec == JobSpec(command=("true",))


def test_every_friendly_field_arrives_in_its_unit() -> None:
    spec = Job(
        ["x"], cpu=0.5, memory="1Gi", gpus=2, timeout=90, grace="2s", pids=9, tmp="1Mi", work=1,
        retries=4, retry_on=("timed_out",), backoff="250ms", backoff_factor=3, backoff_max="1h",
        network="host", require=("cpu", "memory"), priority=-3, start_within="1m",
        env={"A": "b"}, node_labels={"k": "v"}, name="n", group="g", payload="text",
        image="alpine-3.20",
    ).submission().spec  # fmt: skip
    assert (spec.resources.cpu_millis, spec.resources.memory_bytes) == (500, 2**30)
    assert (spec.resources.gpus, spec.limits.wall_ms, spec.limits.grace_ms) == (2, 90_000, 2_000)
    assert (spec.limits.pids_max, spec.limits.tmp_bytes, spec.limits.work_bytes) == (9, 2**20, 1)
    assert (spec.retry.max_attempts, spec.retry.on) == (5, ("timed_out",))
    assert (spec.retry.backoff_ms, spec.retry.backoff_max_ms) == (250, 3_600_000)
    assert spec.isolation.network == "host"
    assert spec.isolation.require == ("memory", "cpu")
    assert (spec.priority, spec.start_within_ms, spec.payload) == (-3, 60_000, b"text")
    assert spec.image == "alpine-3.20"
    assert decode_spec(encode(spec)) == spec


def test_wrong_types_are_told_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="Expected `str`"):
        Job(["x"], env={"A": 1}).submission()  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="Expected `int`"):
        Job(["x"], gpus="two").submission()  # type: ignore[arg-type]
    with pytest.raises(InvalidRecordError, match="NUL"):
        Job(["a\0b"]).submission()


@pytest.mark.parametrize("name", ["args", "outputs", "retry_on", "require", "allow_unenforced"])
def test_a_string_is_no_list_of_its_characters(name: str) -> None:
    options: dict[str, Any] = {name: "ab"}
    with pytest.raises(ConfigError, match=f"{name} is a list of strings, not the string 'ab'"):
        Job(["x"], **options).submission()


@pytest.mark.parametrize(
    "options",
    [{"env": {"A": BAD}}, {"inputs": {BAD: b""}}, {"group": BAD}, {"outputs": [BAD]}],
)
def test_bytes_that_are_no_text_are_told_before_anything_is_sent(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"udcff' is not UTF-8 text"):
        Job(["x"], **options).submission()
    with pytest.raises(ConfigError, match="payload is not UTF-8 text; give it as bytes"):
        Job(["x"], payload=BAD).submission()


def test_a_payload_that_is_too_large_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="object store"):
        Job(["x"], payload=b"x" * (PAYLOAD_BYTES_MAX + 1)).submission()
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(PAYLOAD_BYTES_MAX + 1)
    with pytest.raises(ConfigError, match="object store"):
        Job(["x"], payload=path).submission()


@pytest.mark.parametrize(
    ("script", "command"),
    [
        (b"echo hi", ("sh", "-s", "--")),
        (b"#!/bin/bash -eu\n", ("/bin/bash", "-eu", "-s", "--")),
        (b"#!/usr/bin/env python3.11\n", ("python3.11", "-")),
        (b"#!/usr/bin/env -S perl -w\n", ("perl", "-w", "-")),
    ],
)
def test_the_first_line_names_the_interpreter(script: bytes, command: tuple[str, ...]) -> None:
    assert shebang_command(script) == command


def test_ids_are_fresh_carry_the_name_and_are_kept_where_given() -> None:
    assert new_job_id("report").startswith("report-")
    assert new_job_id("not a name").startswith("job-")
    assert new_job_id() != new_job_id()
    assert identified(Job(["x"], id="mine").submission()).spec.id == "mine"
    assert identified(Job(["x"]).submission()).spec.id


def test_an_array_has_indices_ids_and_a_group() -> None:
    members = array(Job(["x"], id="a", env={"K": "v"}).submission(), 3)
    assert [member.spec.id for member in members] == ["a-0", "a-1", "a-2"]
    assert {member.spec.group for member in members} == {"a"}
    assert members[2].spec.env == {
        "K": "v", "OUTRIDER_ARRAY_INDEX": "2", "OUTRIDER_ARRAY_SIZE": "3",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="array of 0"):
        array(Job(["x"]).submission(), 0)


OUTSIDE = 3


def square(item: int) -> int:
    import math

    return int(math.pow(item, 2))


Number = int


def leaky(item: int) -> int:
    return item * OUTSIDE


def test_a_function_travels_as_source_and_comes_back_as_json(tmp_path: Path) -> None:
    (job,) = function_jobs(square, [7], cpu="100m", python=sys.executable)
    spec = job.submission().spec
    assert spec.name == "square"
    result = tmp_path / "result"
    subprocess.run(
        spec.command, input=spec.payload, env={"OUTRIDER_RESULT": str(result)}, check=True
    )
    assert function_value(result.read_bytes()) == 49
    assert json.loads(spec.payload or b"") == 7


def by_default(item: int, by: int = OUTSIDE) -> int:
    return item * by


def by_lambda(item: int, *, by: Any = lambda one: one * OUTSIDE) -> Any:
    return by(item)


def inside(item: list[int]) -> list[int]:
    return [OUTSIDE * one for one in item]


def annotated(item: Number, *, most: Number = 3) -> list[Number]:
    """Only its annotations name what is not there."""
    found: Any = most

    class Pair:
        first: Sequence[int] = (1, 2)

    def less(one: Number) -> Number:
        return annotated(one)[0] if one > found else one

    return [less(one) + max(Pair.first) for one in range(item)]


@pytest.mark.parametrize("function", [by_default, by_lambda, inside, leaky])
def test_what_a_function_needs_from_outside_is_told(function: Any) -> None:
    with pytest.raises(ConfigError, match="uses OUTSIDE from outside"):
        function_source(function)


def test_what_an_enclosing_function_has_is_outside_too() -> None:
    OUTSIDE = 3

    def closure(item: int) -> int:
        return item * OUTSIDE

    with pytest.raises(ConfigError, match="uses OUTSIDE from outside"):
        function_source(closure)


def test_annotations_may_name_anything(tmp_path: Path) -> None:
    (job,) = function_jobs(annotated, [3], python=sys.executable)
    spec = job.submission().spec
    result = tmp_path / "result"
    subprocess.run(
        spec.command, input=spec.payload, env={"OUTRIDER_RESULT": str(result)}, check=True
    )
    assert function_value(result.read_bytes()) == [2, 3, 4]


def test_a_function_that_does_not_stand_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a lambda"):
        function_source(lambda item: item)
    with pytest.raises(ConfigError, match="item 0 is not JSON"):
        list(function_jobs(square, [object()]))
    with pytest.raises(ConfigError, match="map: "):
        list(function_jobs(square, [1], zebra=1))
    with pytest.raises(ConfigError, match="not the JSON value"):
        function_value(b"")


def test_a_laptop_does_without_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_ALLOW_UNENFORCED", "memory, cpu")
    assert set(REQUIRED_DEFAULT) - set(required_limits(Job(["x"]))) == {"memory", "cpu"}
    monkeypatch.setenv("OUTRIDER_ALLOW_UNENFORCED", "luck")
    with pytest.raises(ConfigError, match="OUTRIDER_ALLOW_UNENFORCED has 'luck'"):
        Job(["x"]).submission()
