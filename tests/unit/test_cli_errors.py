"""Errors of the CLI: one line on stderr, a stable exit code, never a traceback unless asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from idl.errors import (
    BrokerUnavailableError,
    ConfigError,
    InvalidRecordError,
    JobFaultError,
    PlatformFaultError,
)
from outrider.cli import exits
from outrider.cli.main import COMMANDS, cli


def run(*words: str, env: dict[str, str] | None = None, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(words), env=env or {}, input=stdin)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["subit"], 2, "no command 'subit'; did you mean 'submit'?"),
        (["submit", "--zebra"], 2, "No such option"),
        (["submit"], 2, "nothing to submit"),
        (["submit", "--cpu", "many", "--", "x"], 2, "cpu 'many' is not a quantity"),
        (["submit", "--env", "novalue", "--", "x"], 2, "--env 'novalue' is not NAME=VALUE"),
        (["submit", "--gpus", "two", "--", "x"], 2, "'two' is not a valid integer"),
        (["submit", "--id", "a b", "--", "x"], 2, "id 'a b' is not a name"),
        (["submit", "-f", "missing.yaml"], 2, "cannot read job file missing.yaml"),
        (["submit", "-f", "missing.yaml", "--cpu", "2"], 2, "say cpu in the file"),
        (["submit", "--script", "missing.sh"], 2, "cannot read script missing.sh"),
        (["submit", "--script", "a", "--stdin", "b"], 2, "stdin is taken"),
        (["status", "--config", "missing.json"], 2, "cannot read cluster file missing.json"),
        (["status"], 2, "no cluster is known: start one with `outrider up`"),
        (["ls", "--state", "asleep"], 2, "'asleep' is not one of"),
        (["dlq", "show"], 2, "Missing argument 'KEY'"),
        (["down"], 3, "no local cluster 'local' runs"),
        (["down", "--name", "a b"], 2, "cluster name 'a b' is not a name"),
        (["up", "--coordinators", "0"], 2, "0 coordinators; a local cluster has 1 to"),
        (["up", "--queue", "a b"], 2, "queue 'a b' is not a name"),
        (["up", "--node-cpu", "1000"], 2, "exceed this machine"),
        (["completion", "tcsh"], 2, "'tcsh' is not one of"),
    ],
)
def test_a_mistake_is_one_line_and_its_code(
    words: list[str], code: int, told: str, tmp_path: Path
) -> None:
    result = run(*words, env={"XDG_STATE_HOME": str(tmp_path), "OUTRIDER_CONFIG": ""})
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert result.stderr.startswith("outrider: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_bytes_that_are_no_text_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path), "OUTRIDER_CONFIG": ""}
    word = run("submit", "--", "printf", os.fsdecode(b"\xff"), env=env)
    assert (word.exit_code, "is not UTF-8 text" in word.stderr) == (2, True), word.stderr
    file = CliRunner().invoke(cli, ["submit", "-f", "-"], env=env, input=b"command: \xff\n")
    assert (file.exit_code, file.stderr) == (
        2, "outrider: cannot read job file stdin: it is not UTF-8 text\n",
    )  # fmt: skip


def test_a_mistyped_folder_is_neither_purged_nor_used(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    for words in (["down", "--purge"], ["up"]):
        result = run(*words, "--dir", str(tmp_path))
        assert result.exit_code == 2, result.output
        assert str(tmp_path) in result.stderr
        assert [entry.name for entry in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (InvalidRecordError("c", "x"), 2),
        (JobFaultError("x"), 1),
        (BrokerUnavailableError("x"), 4),
        (PlatformFaultError("x"), 4),
        (TimeoutError("x"), 5),
        (exits.NotFoundError("x"), 3),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (exits.ReaderGoneError(), 141),
        (ValueError("x"), 70),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exits.code_of(error) == code
    assert "\n" not in exits.line_of(error)


def test_verbose_adds_the_traceback(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path), "OUTRIDER_CONFIG": ""}
    assert "Traceback" not in run("status", env=env).stderr
    assert "Traceback" in run("status", "-v", env=env).stderr


def test_every_command_has_help_with_examples() -> None:
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        if name != "dlq":
            assert "Examples:" in result.stdout, name
    for name in ("ls", "show", "replay"):
        assert "Examples:" in run("dlq", name, "--help").stdout
    assert "submit" in run().stdout


def test_a_closed_pipe_ends_quietly() -> None:
    """`outrider schema | true`, again and again until the reader is gone before the write."""
    command = f"{sys.executable} -m outrider schema | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.strip() in ("0", "141")


def test_help_loads_neither_kafka_nor_tables() -> None:
    """Start-up time is part of the interface: measured as what is imported, not as time."""
    script = (
        "import sys\n"
        "try:\n    import outrider.cli.main as m; m.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'confluent_kafka', 'rich', 'yaml', 'asyncio', 'msgspec'} & set(sys.modules)\n"
        "sys.stderr.write(','.join(sorted(heavy)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True)  # fmt: skip
    assert result.stderr == ""


def test_schema_and_completion_are_printed() -> None:
    assert json.loads(run("schema").stdout)["title"].startswith("Outrider job")
    for shell in ("bash", "zsh", "fish"):
        assert "_OUTRIDER_COMPLETE" in run("completion", shell).stdout
