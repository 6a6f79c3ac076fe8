"""`events`: the ledger told line by line."""

import queue
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from outrider.cli.common import Session, common, print_json_line, say

if TYPE_CHECKING:
    from dataplane.core.validity import Verdict
    from idl.errors import PlatformFaultError
    from idl.ledger import LedgerEntry
    from idl.settings import ClusterSettings


def clock(at_ms: int) -> str:
    """Epoch ms as local wall-clock time with milliseconds."""
    moment = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone()
    return f"{moment:%H:%M:%S}.{at_ms % 1000:03d}"


def follow_ledger(
    settings: "ClusterSettings", start: int
) -> "Iterator[list[tuple[int, LedgerEntry]]]":
    """Batches of entries from `start` on, for ever. Raises what ends the ledger's tail."""
    from dataplane.ledger import LedgerReader

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reader = LedgerReader(settings.kafka, settings.pool, start, inbox.put, on_error=inbox.put)
    reader.start()
    try:
        while True:
            batch: list[tuple[int, LedgerEntry]] | PlatformFaultError = inbox.get()
            if not isinstance(batch, list):
                raise batch
            yield batch
            reader.done(len(batch))
    finally:
        reader.close()


class _Teller:
    def __init__(self, session: Session, job: str, node: str, void: bool) -> None:
        from dataplane.core.validity import TermGate

        self._session = session
        self._job, self._node, self._void = job, node, void
        self._gate = TermGate()
        self.told = 0

    def tell(self, offset: int, entry: "LedgerEntry") -> None:
        verdict = self._gate.judge(offset, entry)
        if not verdict.valid and not self._void:
            return
        for decision in entry.decisions:
            if self._wanted(decision):
                self.told += 1
                self._say(offset, entry, verdict, decision)

    def _wanted(self, decision: Any) -> bool:
        from outrider.cli.narrate import nodes_of
        from outrider.client.progress import job_of

        return (not self._job or job_of(decision) == self._job) and (
            not self._node or nodes_of(decision) == self._node
        )

    def _say(self, offset: int, entry: "LedgerEntry", verdict: "Verdict", decision: Any) -> None:
        from outrider.cli.narrate import narrate

        if self._session.as_json:
            print_json_line(
                {
                    "offset": offset, "at_ms": entry.at_ms, "term": entry.term,
                    "leader": entry.leader, "valid": verdict.valid, "void": verdict.reason,
                    "decision": decision,
                }
            )  # fmt: skip
            return
        line = narrate(decision, entry.leader, entry.term, entry.at_ms)
        void = "" if verdict.valid else f"VOID ({verdict.reason}: {verdict.detail}) "
        say(f"{offset:>7} {clock(entry.at_ms)} t{entry.term} {void}{line}")


@click.command()
@click.option("--job", default="", help="Only what is about this job.")
@click.option("--node", default="", help="Only what is about this node.")
@click.option("--follow", is_flag=True, help="Go on with what comes.")
@click.option("--void", is_flag=True, help="Also entries that count for nothing, and why.")
@common
def events(session: Session, job: str, node: str, follow: bool, void: bool) -> None:
    """The ledger's decisions as readable lines: offset, time, term, what happened.

    With --json: JSON lines, one decision each.

    \b
    Examples:
      outrider events
      outrider events --job report-17
      outrider events --follow --json | jq .decision.t
      outrider events --void
    """
    from dataplane.kafka import check_reachable
    from dataplane.ledger import read_ledger
    from outrider.cli.exits import NotFoundError

    settings = session.settings
    check_reachable(settings.kafka)
    teller = _Teller(session, job, node, void)
    if follow:
        for batch in follow_ledger(settings, 0):
            for offset, entry in batch:
                teller.tell(offset, entry)
        return
    for offset, entry in read_ledger(settings.kafka, settings.pool):
        teller.tell(offset, entry)
    if not teller.told and (job or node):
        raise NotFoundError(f"nothing in the ledger about {job or node!r}")
