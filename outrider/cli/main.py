"""The root of `outrider`: which command lives where, and the one place where errors end.

Commands are imported when they are used: `outrider --help` loads click and this table only.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import click

from outrider.cli import exits

HELP: Final = """Run large volumes of short, untrusted jobs.

\b
Start a cluster on this machine and run something:
  outrider up
  outrider submit --wait -- echo hello
  outrider status
  outrider down

Exit codes: 0 ok, 1 job failed, 2 usage or configuration, 3 not found, 4 cluster unreachable,
5 timed out, 130 interrupted (docs/cli.md).
"""


class _Place(NamedTuple):
    module: str
    summary: str


COMMANDS: Final[Mapping[str, _Place]] = {
    "up": _Place("local", "Start a cluster on this machine."),
    "down": _Place("local", "Stop the cluster on this machine."),
    "submit": _Place("submit", "Submit jobs, and wait for them if wanted."),
    "status": _Place("cluster", "Leader, queues, nodes and Kafka at a glance."),
    "ls": _Place("jobs", "List jobs."),
    "queue": _Place("queues", "Queues, or one job's place in its queue and why it waits."),
    "why": _Place("queues", "Why a job is where it is."),
    "nodes": _Place("cluster", "Nodes: what they have, use and enforce."),
    "leader": _Place("leader", "Who leads, who led before and why; transfer the lead."),
    "members": _Place("members", "The coordinators; add or remove one while they run."),
    "logs": _Place("output", "A job's stdout and stderr."),
    "result": _Place("output", "A job's result bytes."),
    "cancel": _Place("jobs", "Cancel jobs."),
    "drain": _Place("cluster", "Place nothing more on a node (or again, with --undo)."),
    "events": _Place("events", "The ledger's decisions as readable lines."),
    "dlq": _Place("dlq", "Dead letters: list, show, replay."),
    "audit": _Place("audit", "Fold the whole ledger and check its invariants."),
    "keys": _Place("keys", "Secrets and key pairs of the control plane."),
    "topics": _Place("misc", "Create the cluster's topics in Kafka."),
    "schema": _Place("misc", "The JSON Schema of a job."),
    "completion": _Place("misc", "Shell completion for bash, zsh or fish."),
}


class OutriderGroup(click.Group):
    """Loads commands lazily, in the order of `COMMANDS`, and turns every error into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"outrider.cli.{COMMANDS[cmd_name].module}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for a mistyped name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands, from `COMMANDS` and not from the modules."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but for what click would print or code in a way of its own."""
        try:
            answer = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise exits.ReaderGoneError from error
        except KeyboardInterrupt as error:
            raise exits.ExitError(exits.INTERRUPTED, "interrupted") from error
        return answer

    def main(self, args: Sequence[str] | None = None, *_positional: Any, **extra: Any) -> NoReturn:
        """Runs a command and exits with its code."""
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            answer = super().main(words, *_positional, **extra)
            code = answer if isinstance(answer, int) else exits.OK
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one place where errors end
            code = exits.tell(error, verbose=_is_verbose(words))
        sys.exit(code)


def _is_verbose(words: Sequence[str]) -> bool:
    ours = words[: words.index("--")] if "--" in words else words
    return any(word in ("-v", "--verbose") for word in ours)


@click.group(
    cls=OutriderGroup,
    help=HELP,
    invoke_without_command=True,
    context_settings={"max_content_width": 100},
)
@click.option("-v", "--verbose", is_flag=True, help="Details and tracebacks of errors.")
@click.version_option(package_name="outrider", message="outrider %(version)s")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """The root command; `-v` is looked up in the arguments themselves (`OutriderGroup.main`)."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Entry point of the `outrider` script."""
    cli.main()


if __name__ == "__main__":
    main()
