"""Outputs of a job that has ended, where something is in the way: told as missing, never raised."""

import os
from pathlib import Path
from typing import Any, cast

import pytest

from idl.control import AssignIntent
from idl.errors import InvalidRecordError
from idl.jobs import JobSpec
from idl.topics import TopicNames
from node_agent import files
from node_agent.files import JobFiles, OutputCollection
from node_agent.launcher import kernel
from node_agent.sandbox import outputs


def collection(*names: str) -> OutputCollection:
    """That of a job with these outputs, all of them small: nothing goes to Kafka."""
    nobody = cast("Any", None)
    spec = JobSpec(id="a", command=("x",), outputs=names)
    assign = AssignIntent(job="a", attempt=1, queue="q", spec=spec)
    return OutputCollection(JobFiles(TopicNames("t."), nobody, nobody), assign)


@pytest.fixture
def work(tmp_path: Path) -> int:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("22")
    return os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)


async def test_a_work_directory_that_is_closed_to_us_holds_nothing(
    work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chmod 000 /work` by a job of our own user; root would not notice."""

    def refused(dir_fd: int, path: str, flags: int, resolve: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(kernel, "openat2", refused)
    told = dict.fromkeys(("a", "b", "deep/*"), "Permission denied")
    assert outputs.find(work, ("a", "b", "deep/*")) == outputs.Listing((), told)
    found = collection("a", "b")
    assert found.take is not None
    await found.take(work)
    assert (found.stored, found.missing) == ([], {name: told[name] for name in ("a", "b")})
    os.close(work)


async def test_a_search_that_fails_is_told_of_every_output(
    work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> outputs.Listing:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(outputs, "find", no_room)
    found = collection("a", "b%")
    assert found.take is not None
    await found.take(work)
    assert found.missing == {"a": "Too many open files", "b%25": "Too many open files"}
    os.close(work)


async def test_what_is_there_is_collected(work: int) -> None:
    found = collection("a", "c", "b")
    assert found.take is not None
    await found.take(work)
    assert [(one.name, one.data) for one in found.stored] == [("a", b"1"), ("b", b"22")]
    assert found.missing == {"c": "not there"}
    os.close(work)


async def test_a_file_that_kafka_does_not_take_is_missing_and_stops_no_agent(
    work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster whose limits are not ours may refuse what we allow."""

    async def refused(*_: object) -> object:
        raise InvalidRecordError("too-large", "Kafka takes at most 1 MiB")

    monkeypatch.setattr(files, "put_payload", refused)
    found = collection("a", "b")
    found._inline_left = 1
    assert found.take is not None
    await found.take(work)
    assert [one.name for one in found.stored] == ["a"]
    assert found.missing == {"b": "Kafka takes at most 1 MiB"}
    os.close(work)
