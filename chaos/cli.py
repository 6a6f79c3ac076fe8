"""`outrider-chaos`: break a cluster on purpose, and judge what it made of it."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console

from chaos.checkers import CHECKERS
from chaos.faults.world import parse_pids
from chaos.history import read_history
from chaos.report import report_of, show, write
from chaos.runner import RunOptions, run
from chaos.scenario import built_in, load_scenario, scenario_text
from chaos.sim.command import simulate
from chaos.sweep import clean
from idl.errors import ConfigError, OutriderError
from idl.settings import load_cluster

EXIT_FAILED: Final = 1
EXIT_NOT_RUN: Final = 2
NAMES: Final = frozenset(CHECKERS)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run scenarios: load a cluster, break it, heal it, and judge its history.

    Exit code 0: every checker passed; 1: one failed or could not judge; 2: the run could not be
    carried out.
    """


@cli.command("scenarios")
def scenarios_command() -> None:
    """List the scenarios that come with the harness."""
    for name, text in built_in().items():
        about = load_scenario(name, NAMES).about if text else ""
        click.echo(f"{name:22} {' '.join(about.split())}")


@cli.command("show")
@click.argument("scenario")
def show_command(scenario: str) -> None:
    """Print a scenario's YAML, to start your own from."""
    click.echo(scenario_text(scenario))


@cli.command("run")
@click.option("--scenario", required=True, help="a file, or a name from `scenarios`")
@click.option("--minutes", type=click.FloatRange(0, 10_000, min_open=True), default=1.0)
@click.option("--seed", type=int, default=None, help="load and faults are planned from it")
@click.option("--json", "as_json", is_flag=True, help="report as JSON on stdout")
@click.option("--report", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="folder for report.json, timeline.svg, history.jsonl and logs")  # fmt: skip
@click.option("--cluster", type=click.Path(path_type=Path), default=None,
              help="an existing cluster's file: its load is generated and its ledger judged; "
              "faults are limited to pausing processes given with --pid")  # fmt: skip
@click.option("--i-may-break-this-cluster", "may", is_flag=True, help="needed with --cluster")
@click.option("--pid", "pids", multiple=True, metavar="NAME=PID", help="a local process of it")
def run_command(
    scenario: str,
    minutes: float,
    seed: int | None,
    as_json: bool,
    report: Path | None,
    cluster: Path | None,
    may: bool,
    pids: tuple[str, ...],
) -> None:
    """Run one scenario. Ctrl-C ends it early; everything is healed and judged all the same.

    \b
    Examples:
      outrider-chaos run --scenario kills --minutes 5
      outrider-chaos run --scenario partitions --minutes 2 --seed 7 --report /tmp/r
    """
    if cluster is not None and not may:
        raise ConfigError(
            "--cluster submits jobs to a cluster that is not ours, and may pause its processes; "
            "say --i-may-break-this-cluster if you may"
        )
    if pids and cluster is None:
        raise ConfigError("--pid names processes of an existing cluster; give --cluster too")
    console = Console(stderr=as_json)
    begun = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun:6.1f}s[/dim] {line}", highlight=False)

    found = load_scenario(scenario, NAMES)
    for line in clean(say):
        say(f"left by an earlier run, removed: {line}")
    options = RunOptions(
        scenario=found,
        minutes=minutes,
        seed=time.time_ns() % 1_000_000 if seed is None else seed,
        report=report or Path(tempfile.mkdtemp(prefix=f"chaos-report-{found.name}-")),
        cluster=None if cluster is None else load_cluster(cluster, os.environ),
        pids=parse_pids(pids),
    )
    history = run(options, say)
    told = report_of(history, found.checkers)
    write(told, history, options.report)
    if as_json:
        sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    show(told, console)
    say(f"report, timeline, history and logs are in {options.report}")
    if told.outcome != "pass":
        raise SystemExit(EXIT_FAILED)


@cli.command("judge")
@click.argument("history", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "as_json", is_flag=True, help="report as JSON on stdout")
def judge_command(history: Path, as_json: bool) -> None:
    """Judge a history.jsonl again, e.g. with newer checkers: those that its scenario named."""
    told = report_of(tuple(read_history(history)))
    if as_json:
        sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    show(told, Console(stderr=as_json))
    if told.outcome != "pass":
        raise SystemExit(EXIT_FAILED)


@cli.command("clean")
def clean_command() -> None:
    """Remove what crashed runs left: processes, namespaces, links, mounts, folders."""
    removed = clean(lambda line: click.echo(line, err=True))
    for line in removed:
        click.echo(f"removed {line}")
    if not removed:
        click.echo("nothing was left")


cli.add_command(simulate)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    try:
        cli.main(args=argv, prog_name="outrider-chaos", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_NOT_RUN
    except OutriderError as error:
        sys.stderr.write(f"outrider-chaos: {error}\n")
        return EXIT_NOT_RUN
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
