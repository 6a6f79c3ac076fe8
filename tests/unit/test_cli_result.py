"""`outrider result`: what is printed, and what is written where."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dataplane.core.jobs import Phase
from idl.jobs import SourceRef
from idl.records import AttemptResult, AttemptStory
from outrider.cli import output
from outrider.cli.main import cli
from outrider.client.errors import OutputMissingError
from outrider.client.progress import JobEnd

HERE = SourceRef(topic="results", partition=0, offset=0)
RECORD = AttemptResult(job="j", attempt=1, term=1, node="n1", outcome="succeeded", started_ms=1,
                       ended_ms=2)  # fmt: skip
STORY = AttemptStory(attempt=1, node="n1", outcome="succeeded", result=HERE)


class FakeClient:
    """What of Client the command uses."""

    def read_result(self, _source: SourceRef) -> AttemptResult:
        return RECORD

    def bytes_of(self, _record: AttemptResult) -> bytes:
        return b"the result"

    def output_bytes(self, record: AttemptResult, name: str) -> bytes:
        if name != "plot.png":
            raise OutputMissingError(name, record)
        return b"the plot"


class FakeHandle:
    """Of a job that finished."""

    done = True

    def wait(self, _timeout: float | None) -> JobEnd:
        return JobEnd(job="j", phase=Phase.FINISHED, at_ms=2, attempt=1, attempts=(STORY,))


@pytest.fixture(autouse=True)
def _a_finished_job(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected(_session: Any) -> Iterator[FakeClient]:
        yield FakeClient()

    monkeypatch.setattr(output, "connected", connected)
    monkeypatch.setattr(output, "found", lambda _client, _job: FakeHandle())


@pytest.mark.parametrize(
    ("words", "printed", "written"),
    [
        ((), "the result", ""),
        (("--output", "plot.png"), "the plot", ""),
        (("--to", "F"), "", "the result"),
        (("--output", "plot.png", "--to", "F"), "", "the plot"),
        (("--json",), '"outcome": "succeeded"', ""),
        (("--json", "--output", "plot.png"), '"outcome": "succeeded"', ""),
        (("--json", "--to", "F"), '"outcome": "succeeded"', "the result"),
        (("--json", "--output", "plot.png", "--to", "F"), '"outcome": "succeeded"', "the plot"),
        (("--usage", "--output", "plot.png", "--to", "F"), "succeeded", "the plot"),
        (("--usage", "--to", "F"), "succeeded", "the result"),
    ],
)
def test_a_named_file_is_always_written(
    words: tuple[str, ...], printed: str, written: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    told = CliRunner().invoke(
        cli, ["result", "j", *(str(file) if word == "F" else word for word in words)]
    )
    assert told.exit_code == 0, told.output
    assert printed in told.stdout and bool(printed) == bool(told.stdout)
    assert "the result" not in told.stdout or words == ()
    assert (file.read_text() if file.exists() else "") == written


def test_an_output_that_is_not_there_is_told(tmp_path: Path) -> None:
    for more in ((), ("--to", str(tmp_path / "file"), "--json")):
        told = CliRunner().invoke(cli, ["result", "j", "--output", "none", *more])
        assert told.exit_code == 3
        assert "none" in told.stderr
    assert not (tmp_path / "file").exists()
