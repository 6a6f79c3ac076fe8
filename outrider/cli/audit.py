"""`audit`: the whole ledger folded again, its invariants checked."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import click

from outrider.cli.common import Session, common
from outrider.cli.exits import JOB_FAILED, ExitError

if TYPE_CHECKING:
    from dataplane.core.validity import Verdict
    from idl.ledger import LedgerEntry
    from idl.snapshots import SnapshotHead
    from outrider.client.view import LedgerView

CHECK_EVERY_ENTRIES: Final = 1_000
"""check_invariants walks everything alive; between two walks the fold itself checks each entry."""


class _Auditor:
    def __init__(self, view: "LedgerView") -> None:
        self.view = view
        self.entries = 0
        self.decisions: Counter[str] = Counter()

        self.snapshot: SnapshotHead | None = None
        """The newest, compared with the fold where the fold comes by."""
        self.snapshot_matches: bool | None = None

    def seen(self, offset: int, entry: "LedgerEntry", verdict: "Verdict") -> None:
        self.entries += 1
        if self.snapshot is not None and self.snapshot.next_offset == offset + 1:
            self.snapshot_matches = self.view.state.state_hash() == self.snapshot.state_hash
        if verdict.valid:
            self.decisions.update(type(decision).__name__ for decision in entry.decisions)
        if self.entries % CHECK_EVERY_ENTRIES == 0:
            self.view.state.check_invariants()


def _document(auditor: _Auditor, broken: str) -> dict[str, Any]:
    state = auditor.view.state
    recovered = auditor.view.recovered
    start = recovered.head.next_offset if recovered and recovered.head else 0
    counts = auditor.decisions
    ended = counts["Finished"] + counts["DeadLettered"] + counts["Cancelled"]
    return {
        "ok": not broken,
        "broken": broken,
        "from_offset": start,
        "snapshot_offset": auditor.snapshot.next_offset if auditor.snapshot else -1,
        "snapshot_matches": auditor.snapshot_matches,
        "snapshots_refused": recovered.notes if recovered else (),
        "entries": auditor.entries,
        "void": sum(state.void_counts.values()),
        "void_reasons": state.void_counts,
        "terms": counts["TermStarted"],
        "accepted": counts["Ingested"],
        "ended": ended,
        "finished": counts["Finished"],
        "dead": counts["DeadLettered"],
        "cancelled": counts["Cancelled"],
        "live": len(state.jobs),
        "rejected": counts["Rejected"],
        "attempts": counts["Assigned"],
        "results_refused": counts["ResultRefused"],
        "leases_awaited": counts["LeaseAwaited"],
        "dead_letters_due": len(state.dead_letters_due),
        "state_hash": state.state_hash(),
    }


def _show(document: dict[str, Any]) -> None:
    void = ", ".join(f"{count} {reason}" for reason, count in document["void_reasons"].items())
    click.echo(
        f"entries   {document['entries']}, {document['void']} void{f' ({void})' if void else ''}"
    )
    if document["from_offset"]:
        click.echo(f"from      snapshot at offset {document['from_offset']}, counts since then")
    elif document["snapshot_matches"] is not None:
        same = "is the state" if document["snapshot_matches"] else "IS NOT THE STATE"
        click.echo(f"snapshot  at offset {document['snapshot_offset']} {same} of the ledger there")
    for refused in document["snapshots_refused"]:
        click.echo(refused)
    click.echo(f"terms     {document['terms']}")
    click.echo(
        f"jobs      {document['accepted']} accepted = {document['finished']} finished "
        f"+ {document['dead']} dead + {document['cancelled']} cancelled + {document['live']} live"
    )
    waited = document["leases_awaited"]
    leases = f", {waited} waits for an exclusive job's lease" if waited else ""
    click.echo(
        f"attempts  {document['attempts']}, {document['results_refused']} results refused{leases}"
    )
    click.echo(f"rejected  {document['rejected']}")
    click.echo(f"state     {document['state_hash']}")
    if document["ok"]:
        click.echo("every invariant holds")


def _broken_sum(document: dict[str, Any], live_before: int) -> str:
    if document["snapshot_matches"] is False:
        return f"the snapshot at {document['snapshot_offset']} is not the state of the ledger there"
    if live_before + document["accepted"] != document["ended"] + document["live"]:
        return "accepted jobs are not those that ended or live"
    return ""


@click.command()
@click.option(
    "--from-snapshot/--from-start", "from_snapshot", default=False,
    help="Only what came after the newest good snapshot (fast); default: everything.",
)  # fmt: skip
@common
def audit(session: Session, from_snapshot: bool) -> None:
    """Fold the whole ledger again and check what must hold of any history.

    One leader per term, terms grow; every accepted job is live or ended exactly once; one result
    per job, of the attempt that was current; no node over-committed, also by what it may still
    run; no exclusive attempt given up before its lease was over. Exit code 1 where it does not
    hold.

    \b
    Examples:
      outrider audit
      outrider audit --from-snapshot
      outrider audit --json | jq '{accepted, ended, live}'
    """
    from dataplane.kafka import check_reachable
    from dataplane.snapshots import newest_head
    from idl.errors import InvariantBrokenError
    from outrider.client.view import LedgerView

    kafka = session.settings.kafka
    check_reachable(kafka)
    auditor = _Auditor(LedgerView(session.settings, from_snapshot=from_snapshot))
    broken, live_before = "", 0
    try:
        if from_snapshot:
            live_before = len(auditor.view.begin().jobs)
        elif (newest := newest_head(kafka, session.settings.pool)) is not None:
            auditor.snapshot = newest[1]
        auditor.view.advance(auditor.seen)
        auditor.view.state.check_invariants()
    except InvariantBrokenError as error:
        broken = f"after {auditor.entries} entries: {error}"
    document = _document(auditor, broken)
    broken = broken or _broken_sum(document, live_before)
    document |= {"broken": broken, "ok": not broken}
    session.answer(document, lambda: _show(document))
    if broken:
        raise ExitError(JOB_FAILED, f"invariant broken {broken}")
