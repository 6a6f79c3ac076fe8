"""`audit`: the whole ledger folded again, its invariants checked."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import click

from outrider.cli.common import Session, common
from outrider.cli.exits import JOB_FAILED, ExitError

if TYPE_CHECKING:
    from dataplane.core.validity import Verdict
    from idl.ledger import LedgerEntry
    from outrider.client.view import LedgerView

CHECK_EVERY_ENTRIES: Final = 1_000
"""check_invariants walks everything alive; between two walks the fold itself checks each entry."""


class _Auditor:
    def __init__(self, view: "LedgerView") -> None:
        self.view = view
        self.entries = 0
        self.decisions: Counter[str] = Counter()

    def seen(self, _offset: int, entry: "LedgerEntry", verdict: "Verdict") -> None:
        self.entries += 1
        if verdict.valid:
            self.decisions.update(type(decision).__name__ for decision in entry.decisions)
        if self.entries % CHECK_EVERY_ENTRIES == 0:
            self.view.state.check_invariants()


def _document(auditor: _Auditor, broken: str) -> dict[str, Any]:
    state = auditor.view.state
    counts = auditor.decisions
    ended = counts["Finished"] + counts["DeadLettered"] + counts["Cancelled"]
    return {
        "ok": not broken,
        "broken": broken,
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
        "dead_letters_due": len(state.dead_letters_due),
        "state_hash": state.state_hash(),
    }


def _show(document: dict[str, Any]) -> None:
    void = ", ".join(f"{count} {reason}" for reason, count in document["void_reasons"].items())
    click.echo(
        f"entries   {document['entries']}, {document['void']} void{f' ({void})' if void else ''}"
    )
    click.echo(f"terms     {document['terms']}")
    click.echo(
        f"jobs      {document['accepted']} accepted = {document['finished']} finished "
        f"+ {document['dead']} dead + {document['cancelled']} cancelled + {document['live']} live"
    )
    click.echo(f"attempts  {document['attempts']}, {document['results_refused']} results refused")
    click.echo(f"rejected  {document['rejected']}")
    click.echo(f"state     {document['state_hash']}")
    if document["ok"]:
        click.echo("every invariant holds")


@click.command()
@common
def audit(session: Session) -> None:
    """Fold the whole ledger again and check what must hold of any history.

    One leader per term, terms grow; every accepted job is live or ended exactly once; one result
    per job, of the attempt that was current; no node over-committed. Exit code 1 where it does
    not hold.

    \b
    Examples:
      outrider audit
      outrider audit --json | jq '{accepted, ended, live}'
    """
    from dataplane.kafka import check_reachable
    from idl.errors import InvariantBrokenError
    from outrider.client.view import LedgerView

    check_reachable(session.settings.kafka)
    auditor = _Auditor(LedgerView(session.settings))
    broken = ""
    try:
        auditor.view.advance(auditor.seen)
        auditor.view.state.check_invariants()
    except InvariantBrokenError as error:
        broken = f"after {auditor.entries} entries: {error}"
    document = _document(auditor, broken)
    if not broken and document["accepted"] != document["ended"] + document["live"]:
        broken = document["broken"] = "accepted jobs are not those that ended or live"
        document["ok"] = False
    session.answer(document, lambda: _show(document))
    if broken:
        raise ExitError(JOB_FAILED, f"invariant broken {broken}")
