"""Exit codes of every command, and how an exception becomes one line and a code.

They are a contract (`docs/cli.md`): scripts and services branch on them.
"""

import os
import sys
import traceback
from typing import Final

import click

from idl.errors import (
    BrokerUnavailableError,
    ConfigError,
    InvalidRecordError,
    OutriderError,
    PlatformFaultError,
)

OK: Final = 0
JOB_FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
UNREACHABLE: Final = 4
TIMED_OUT: Final = 5
BUG: Final = 70
"""EX_SOFTWARE of sysexits(3): our bug, or something we did not think of."""
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""
BROKEN_PIPE: Final = 141
"""128 + SIGPIPE: the reader of our output went away (`outrider events | head`)."""


class ExitError(OutriderError):
    """Ends a command with a code and, where there is one, a line on stderr."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message)
        self.code = code


class ReaderGoneError(ExitError):
    """Whoever read our output went away: nobody is left to be told anything."""

    def __init__(self) -> None:
        super().__init__(BROKEN_PIPE)


class NotFoundError(ExitError):
    """What was asked for is not in the ledger (or wherever it would be)."""

    def __init__(self, message: str) -> None:
        super().__init__(NOT_FOUND, message)


def code_of(error: BaseException) -> int:
    """The exit code that this error means."""
    if isinstance(error, ExitError):
        return error.code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED
    if isinstance(error, BrokerUnavailableError):
        return UNREACHABLE
    if isinstance(error, ConfigError | InvalidRecordError | click.ClickException):
        return USAGE
    if isinstance(error, TimeoutError):
        return TIMED_OUT
    if isinstance(error, PlatformFaultError):
        return UNREACHABLE
    if isinstance(error, OutriderError):
        return JOB_FAILED
    return BUG


_BARE: Final = (*range(127, 160),)
"""What JSON lets through and a terminal obeys: DEL and C1."""
_UNSEEN: Final = (
    0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070),
    0xFEFF,
)  # fmt: skip
"""Other line ends (Zl, Zp), and what reorders or hides text (Cf)."""
_CONTROL: Final = {
    **{code: f"\\x{code:02x}" for code in (*range(32), *_BARE)},
    **{code: f"\\u{code:04x}" for code in _UNSEEN},
}
_JSON_CONTROL: Final = {code: f"\\u{code:04x}" for code in _BARE}


def json_text(document: str) -> str:
    """The same JSON without a character that a terminal would obey."""
    return document.translate(_JSON_CONTROL)


def printable(text: str) -> str:
    """The text with control characters, and those that end lines or reorder text, spelled out.

    Names, commands and reasons come from untrusted submitters: an escape sequence in them must not
    reach a terminal. (`logs` and `result` are bytes as the job wrote them, like `cat`.)
    """
    return text.translate(_CONTROL)


def line_of(error: BaseException) -> str:
    """What a person is told, in one line; empty where there is nothing to say."""
    if isinstance(error, click.UsageError):
        context = error.ctx
        hint = f" (try `{context.command_path} --help`)" if context is not None else ""
        return " ".join(error.format_message().split()) + hint
    if isinstance(error, click.ClickException):
        return " ".join(error.format_message().split())
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted"
    if isinstance(error, OutriderError | TimeoutError):
        return " ".join(str(error).split())
    return (
        f"unexpected {type(error).__name__}: {error}; please report it, with -v for the traceback"
    )


def tell(error: BaseException, *, verbose: bool) -> int:
    """Prints the error as one line (under `verbose` its details too); returns the exit code."""
    line = line_of(error)
    if line:
        click.echo(f"outrider: {printable(line)}", err=True)
    if verbose and line:
        log = getattr(error, "log", "")
        if log:
            click.echo(log, err=True)
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, ReaderGoneError):
        _silence_stdout()
    return code_of(error)


def _silence_stdout() -> None:
    """Python flushes stdout at exit; where its reader is gone that would print a traceback."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
