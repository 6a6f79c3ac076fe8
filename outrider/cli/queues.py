"""`queue` and `why`: how deep the queues are, and why a job is where it is."""

from typing import TYPE_CHECKING, Any

import click

from outrider.cli.common import Session, common, now_ms, print_table, say

if TYPE_CHECKING:
    from dataplane.core.explain import Explanation
    from dataplane.core.state import PoolState
    from idl.settings import ClusterSettings


def unread(settings: "ClusterSettings", state: "PoolState", queue: str) -> int:
    """Submissions in Kafka beyond what the ledger says was taken in."""
    from dataplane.tail import watermarks
    from idl.ids import QueueName
    from idl.topics import TopicNames

    topic = TopicNames(settings.kafka.prefix).queue(QueueName(queue))
    return sum(
        max(0, end - max(first, state.positions.get((topic, partition), 0)))
        for partition, (first, end) in watermarks(settings.kafka, topic).items()
    )


def queue_rows(settings: "ClusterSettings", state: "PoolState") -> list[dict[str, Any]]:
    """Every queue in numbers, by name, those that are only in the ledger too."""
    from dataplane.core.state import QueueCounters

    rows = []
    for name in sorted({*settings.queues, *state.queues}):
        counters = state.queues.get(name, QueueCounters())
        configured = name in settings.queues
        rows.append(
            {
                "queue": name,
                "unread": unread(settings, state, name) if configured else 0,
                "pending": counters.pending,
                "running": counters.placed,
                "finished": counters.finished,
                "dead": counters.dead,
                "cancelled": counters.cancelled,
                "rejected": counters.rejected,
                "ingested": counters.ingested,
            }
        )
    return rows


def show_queues(rows: list[dict[str, Any]]) -> None:
    """The table of queues."""
    names = ("unread", "pending", "running", "finished", "dead", "cancelled", "rejected")
    print_table(
        ("QUEUE", *(f">{name.upper()}" for name in names)),
        [(row["queue"], *(row[name] for name in names)) for row in rows],
        empty="no queues",
    )


def explanation(session: Session, job: str) -> "Explanation":
    """Why `job` is where it is. Raises NotFoundError."""
    from dataplane.core.explain import explain
    from outrider.cli.exits import NotFoundError

    found = explain(session.view().state, job, now_ms())
    if found.code == "Unknown":
        raise NotFoundError(f"job {job!r}: {found.message}")
    return found


def _show(found: "Explanation") -> None:
    place = f", number {found.position} in its pool" if found.position else ""
    say(f"{found.job}: {found.code}{place}")
    say(f"  {found.message}")
    if found.nodes:
        print_table(("  NODE", "WHY NOT"), [(f"  {n.node}", n.why or "fits") for n in found.nodes])


@click.command()
@click.argument("job", required=False)
@common
def queue(session: Session, job: str | None) -> None:
    """Queues in numbers; with JOB its place among pending jobs and why it waits.

    \b
    Examples:
      outrider queue
      outrider queue report-17
    """
    if job is not None:
        found = explanation(session, job)
        session.answer(found, lambda: _show(found))
        return
    rows = queue_rows(session.settings, session.view().state)
    session.answer(rows, lambda: show_queues(rows))


@click.command()
@click.argument("job")
@common
def why(session: Session, job: str) -> None:
    """Why JOB is where it is: its state, its place, and what each node lacks for it.

    \b
    Examples:
      outrider why report-17
      outrider why report-17 --json | jq .code
    """
    found = explanation(session, job)
    session.answer(found, lambda: _show(found))
