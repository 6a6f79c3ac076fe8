"""`ls` and `cancel`: many jobs at once."""

from typing import TYPE_CHECKING, Any, Final

import click

from outrider.cli.common import Session, age, common, now_ms, print_table

if TYPE_CHECKING:
    from dataplane.core.jobs import EndedJob, Job
    from dataplane.core.state import PoolState

LIMIT_DEFAULT: Final = 100
"""Rows of `ls`: a screenful or two; the newest are shown, `--limit 0` shows all."""

STATES: Final = {
    "pending": ("pending", "backing_off"),
    "running": ("assigned", "running"),
    "live": ("pending", "backing_off", "assigned", "running"),
    "ended": ("finished", "dead", "cancelled"),
    "backing_off": ("backing_off",),
    "assigned": ("assigned",),
    "finished": ("finished",),
    "dead": ("dead",),
    "cancelled": ("cancelled",),
}
"""What `--state` takes → phases."""


def _live(job: "Job") -> dict[str, Any]:
    waiting = f"{job.waiting[0]}: {job.waiting[1]}" if job.waiting else ""
    return {
        "job": job.id,
        "queue": job.queue,
        "state": str(job.phase),
        "attempt": job.attempt,
        "node": job.node,
        "name": job.spec.name,
        "group": job.spec.group,
        "priority": job.spec.priority,
        "ingested_ms": job.ingested_ms,
        "started_ms": job.started_ms,
        "ended_ms": 0,
        "outcome": None,
        "exit_code": None,
        "note": "being cancelled" if job.cancel_requested else waiting,
    }


def _ended(job: "EndedJob") -> dict[str, Any]:
    return {
        "job": job.id,
        "queue": job.queue,
        "state": str(job.phase),
        "attempt": job.attempt,
        "node": job.node,
        "name": job.name,
        "group": job.group,
        "priority": None,
        "ingested_ms": job.ingested_ms,
        "started_ms": job.started_ms,
        "ended_ms": job.ended_ms,
        "outcome": job.outcome,
        "exit_code": job.exit_code,
        "note": job.reason if str(job.phase) != "finished" else "",
    }


def job_rows(state: "PoolState") -> list[dict[str, Any]]:
    """Every job that the state remembers, in order of acceptance."""
    rows = [*map(_ended, state.ended.values()), *map(_live, state.jobs.values())]
    simulated = {name for name, node in state.nodes.items() if node.simulated}
    for row in rows:
        row["simulated"] = row["node"] in simulated
    return sorted(rows, key=lambda row: row["ingested_ms"])


def _show(rows: list[dict[str, Any]], older: int) -> None:
    now = now_ms()
    shown = [
        (
            row["job"], row["queue"], row["state"], row["attempt"] or "-",
            f"{row['node'] or '-'}{' (simulated)' if row['simulated'] else ''}",
            age(now, row["ingested_ms"]), row["group"] or "-",
            row["note"] if len(row["note"]) <= 60 else row["note"][:59] + "…",
        )
        for row in rows
    ]  # fmt: skip
    print_table(
        ("JOB", "QUEUE", "STATE", ">ATTEMPT", "NODE", ">AGE", "GROUP", "NOTE"),
        shown,
        empty="no jobs",
    )
    if older:
        click.echo(f"… {older} older not shown (--limit 0 shows all)", err=True)


@click.command()
@click.option("--state", type=click.Choice(list(STATES)), help="Only jobs in this state.")
@click.option("--queue", "queue_name", help="Only jobs of this queue.")
@click.option("--group", help="Only jobs of this group.")
@click.option(
    "--limit", type=click.IntRange(min=0), default=LIMIT_DEFAULT, show_default=True,
    help="The newest so many; 0: all.",
)  # fmt: skip
@common
def ls(
    session: Session, state: str | None, queue_name: str | None, group: str | None, limit: int
) -> None:
    """List jobs, oldest first.

    Jobs that wait unread in Kafka are not listed: `outrider queue` counts them.

    \b
    Examples:
      outrider ls --state running
      outrider ls --group report --state dead --json | jq -r '.[].job'
    """
    phases = STATES[state] if state else None
    rows = [
        row
        for row in job_rows(session.view().state)
        if (phases is None or row["state"] in phases)
        and (queue_name is None or row["queue"] == queue_name)
        and (group is None or row["group"] == group)
    ]
    older = max(0, len(rows) - limit) if limit else 0
    session.answer(rows[older:], lambda: _show(rows[older:], older))


@click.command()
@click.argument("jobs", nargs=-1, metavar="JOB...")
@click.option("--group", help="All live jobs of this group.")
@common
def cancel(session: Session, jobs: tuple[str, ...], group: str | None) -> None:
    """Cancel jobs: at once where they wait, after their attempt was killed where they run.

    Returns once the leader has taken the orders. Exit code 1 where it refused one.

    \b
    Examples:
      outrider cancel report-17
      outrider cancel --group report
    """
    from idl.records import CancelJob
    from outrider.cli.exits import NotFoundError
    from outrider.cli.orders import give_orders

    if bool(jobs) == bool(group):
        raise click.UsageError("name jobs, or a --group, and not both")
    view = session.view()
    state = view.state
    for job in jobs:
        if job in state.ended:
            raise NotFoundError(f"job {job!r} has ended already ({state.ended[job].phase})")
        if job not in state.jobs:
            raise NotFoundError(f"no job {job!r} in the ledger; `outrider ls` shows all")
    wanted = jobs or tuple(job.id for job in state.jobs.values() if job.spec.group == group)
    if not wanted:
        raise NotFoundError(f"no live job in group {group!r}")
    give_orders(session, view, {job: CancelJob(job=job) for job in wanted})
    many = "s" if len(wanted) > 1 else ""
    session.answer(
        {"cancelled": wanted}, lambda: click.echo(f"ordered: cancel {len(wanted)} job{many}")
    )
