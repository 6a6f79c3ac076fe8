"""What every command shares: `--config --json -v`, the cluster it means, tables and JSON out."""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import msgspec

from outrider.cli.exits import json_text, printable

if TYPE_CHECKING:
    from idl.settings import ClusterSettings
    from outrider.client.view import LedgerView

_R = TypeVar("_R")

PIPE_WIDTH: Final = 200
"""Columns of a table that does not go to a terminal: wide enough not to cut what is grepped."""


class Session:
    """One run of one command: which cluster, and in which form it answers."""

    def __init__(self, config: str | None, as_json: bool) -> None:
        self.config = config
        self.as_json = as_json

    @functools.cached_property
    def settings(self) -> "ClusterSettings":
        """The cluster file. Raises ConfigError."""
        from outrider.client.config import find_cluster

        return find_cluster(self.config)

    def view(self) -> "LedgerView":
        """The ledger folded up to its present end. Raises BrokerUnavailableError."""
        from dataplane.kafka import check_reachable
        from outrider.client.view import LedgerView

        check_reachable(self.settings.kafka)
        view = LedgerView(self.settings, from_snapshot=True)
        view.advance()
        return view

    def answer(self, document: object, human: Callable[[], None]) -> None:
        """One JSON document under `--json`, else what `human` prints."""
        if self.as_json:
            print_json(document)
        else:
            human()

    def progress(self, line: str) -> None:
        """A line of progress on stderr, so that stdout stays what was asked for."""
        if not self.as_json:
            click.echo(line, err=True)


def common(command: Callable[..., _R]) -> Callable[..., _R]:
    """Adds `--config`, `--json` and `-v`; the command gets a `Session` as its first argument."""

    @click.option(
        "--config", metavar="FILE", help="Cluster file; default $OUTRIDER_CONFIG or the local one."
    )
    @click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
    @click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Details of errors.")
    @functools.wraps(command)
    def wrapped(config: str | None, as_json: bool, **options: Any) -> _R:
        return command(Session(config, as_json), **options)

    return wrapped


def say(line: str) -> None:
    """One line on stdout that may hold words of untrusted submitters."""
    click.echo(printable(line))


def say_all(lines: Iterable[str]) -> None:
    """Several such lines."""
    for line in lines:
        say(line)


def print_json(document: object) -> None:
    """One document, indented for people as `jq` does."""
    click.echo(json_text(msgspec.json.format(msgspec.json.encode(document), indent=2).decode()))


def print_json_line(document: object) -> None:
    """One line of a stream, flushed so that a follower sees it now."""
    click.echo(json_text(msgspec.json.encode(document).decode()))
    sys.stdout.flush()


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "nothing to show"
) -> None:
    """A table without lines. A column whose name starts with `>` is right-aligned (numbers)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    texts = [[printable(str(cell)) for cell in row] for row in rows]
    cells = [[Text(text, style=_style(text)) for text in row] for row in texts]
    if not cells:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(width=width, soft_wrap=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    lines = (line.rstrip() for line in captured.get().split("\n"))
    click.echo("\n".join(lines).rstrip("\n"))


_STYLES: Final = {
    "finished": "green", "running": "cyan", "pending": "yellow", "dead": "red",
    "ready": "green", "lost": "red", "ok": "green", "stalled": "red", "failed": "red",
    "succeeded": "green", "ended": "red",
}  # fmt: skip


def _style(cell: str) -> str:
    return _STYLES.get(cell.split(" ", maxsplit=1)[0], "")


def age(now_ms: int, then_ms: int) -> str:
    """How long ago, as `12s`, `3m` or `2h`."""
    seconds = max(0, now_ms - then_ms) / 1000
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def now_ms() -> int:
    """Wall clock, epoch ms."""
    import time

    return time.time_ns() // 1_000_000


def key_values(pairs: Iterable[str], what: str) -> dict[str, str]:
    """`k=v` words as a mapping. Raises click.UsageError."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.UsageError(f"{what} {pair!r} is not NAME=VALUE")
        found[key] = value
    return found
