"""The report of a run: verdicts, faults, silences; as a table, as JSON, as a picture."""

from collections import Counter
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chaos.checkers import CHECKERS, Verdict, judge, worst
from chaos.checkers.availability import gaps
from chaos.history import FaultBegan, FaultSkipped, History, Phase, RunStarted, of
from chaos.timeline import timeline
from idl.errors import ConfigError

REPORT_FILE: Final = "report.json"
PICTURE_FILE: Final = "timeline.svg"
STYLE: Final = {"pass": "green", "unknown": "yellow", "fail": "red"}
PROBLEMS_IN_TABLE: Final = 5
MEANS: Final = {"netem": "the kernel (tc-netem)", "wire": "a wire of ours (no sch_netem here)"}


class GapTold(msgspec.Struct, frozen=True, kw_only=True):
    """One fault's longest silence."""

    fault: int
    kind: str
    hit_leader: bool
    ms: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`."""

    v: int = 1
    scenario: str
    seed: int
    minutes: float
    outcome: str
    verdicts: list[Verdict]
    faults: dict[str, int]
    means: dict[str, str]
    """Kind of fault → by what it was done, where there are several ways."""
    skipped: dict[str, str]
    gaps: list[GapTold]
    interrupted: bool = False


def report_of(history: History, checkers: tuple[str, ...] = ()) -> Report:
    """Judges a history: by these checkers, else by those that its scenario named. Pure.

    Raises ConfigError where a history names a checker that there is not (any more).
    """
    started = next(iter(of(RunStarted, history)), None)
    names = checkers or (started.checkers if started else ()) or tuple(CHECKERS)
    unknown = set(names) - CHECKERS.keys()
    if unknown:
        raise ConfigError(f"there is no checker {min(unknown)!r}, which the history names")
    if started is not None and started.strangers:
        names = tuple(name for name in names if name != "leftovers")  # it goes on without us
    verdicts = judge(history, names)
    return Report(
        scenario=started.scenario if started else "",
        seed=started.seed if started else 0,
        minutes=started.minutes if started else 0.0,
        outcome=worst(verdicts),
        verdicts=verdicts,
        faults=dict(Counter(fault.kind for fault in of(FaultBegan, history))),
        means={fault.kind: fault.means for fault in of(FaultBegan, history) if fault.means},
        skipped={event.kind: event.reason for event in of(FaultSkipped, history)},
        gaps=[
            GapTold(fault=gap.fault, kind=gap.kind, hit_leader=gap.hit_leader,
                    ms=round(gap.length_ms, 1))
            for gap in gaps(history)
        ],
        interrupted=any(phase.name == "interrupted" for phase in of(Phase, history)),
    )  # fmt: skip


def write(report: Report, history: History, folder: Path) -> None:
    """`report.json` and `timeline.svg`."""
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (folder / REPORT_FILE).write_bytes(encoded + b"\n")
    (folder / PICTURE_FILE).write_text(timeline(history))


def show(report: Report, console: Console) -> None:
    """The table."""
    faults = ", ".join(f"{count} {kind}" for kind, count in report.faults.items()) or "none"
    table = Table(title=f"{report.scenario}, seed {report.seed}, {report.minutes:g} min; "
                        f"faults: {faults}", title_justify="left")  # fmt: skip
    for column in ("checker", "verdict", "figures and problems"):
        table.add_column(column)
    for verdict in report.verdicts:
        style = STYLE[verdict.outcome]
        told = ", ".join(f"{key} {value}" for key, value in verdict.figures.items())
        if verdict.checker == "availability":
            told = "\n".join(f"{key}: {value}" for key, value in verdict.figures.items())
        lines = [told, *verdict.problems[:PROBLEMS_IN_TABLE]]
        if len(verdict.problems) > PROBLEMS_IN_TABLE:
            lines.append(f"… {len(verdict.problems)} problems, all in {REPORT_FILE}")
        table.add_row(verdict.checker, f"[{style}]{verdict.outcome}[/{style}]",
                      escape("\n".join(line for line in lines if line)))  # fmt: skip
    console.print(table)
    for kind, means in report.means.items():
        console.print(f"{kind}: made by {MEANS[means]}", highlight=False)
    for kind, reason in report.skipped.items():
        console.print(f"[yellow]skipped[/yellow] {kind}: {escape(reason)}", highlight=False)
    style = STYLE[report.outcome]
    console.print(f"[{style}]{report.outcome}[/{style}]", highlight=False)
