"""`leader`: who leads, who led before and why each term ended; `leader transfer`."""

import time
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from outrider.cli.common import Session, age, common, now_ms, print_table
from outrider.cli.exits import JOB_FAILED, TIMED_OUT, ExitError

if TYPE_CHECKING:
    from dataplane.core.state import PoolState
    from outrider.client.view import LedgerView

TRANSFER_TIMEOUT_S: Final = 10.0
"""A successor takes milliseconds, an election without one a second or two."""
POLL_S: Final = 0.02


def term_documents(state: "PoolState") -> list[dict[str, Any]]:
    """The terms remembered, oldest first. `ended`: what the next leader knew of the end."""
    terms = list(state.terms)
    following = [*terms[1:], None]
    return [
        {
            **msgspec.to_builtins(term),
            "ended_ms": after.at_ms if after else None,
            "ended": after.why if after else "",
        }
        for term, after in zip(terms, following, strict=True)
    ]


def _show(documents: list[dict[str, Any]]) -> None:
    now = now_ms()
    rows = [
        (
            doc["term"],
            doc["leader"],
            age(now, doc["at_ms"]) + " ago",
            f"{((doc['ended_ms'] or now) - doc['at_ms']) / 1000:.1f}s",
            (doc["ended"] or "not said") if doc["ended_ms"] else "leads",
        )
        for doc in documents
    ]
    print_table(
        (">TERM", "LEADER", "STARTED", ">FOR", "ENDED BECAUSE"),
        rows,
        empty="nobody has led yet; are the coordinators running?",
    )


@click.group(invoke_without_command=True)
@common
def leader(session: Session) -> None:
    """Who leads (by the ledger), the terms before, and why each ended.

    Which coordinator stands first is its `preference` in the cluster file, then its name. A lead is
    never taken from a healthy leader: to move it, use `outrider leader transfer`.

    \b
    Examples:
      outrider leader
      outrider leader --json | jq .term
      outrider leader transfer --to c2
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    view = session.view()
    terms = term_documents(view.state)
    document = {"leader": view.leader, "term": view.state.term, "terms": terms}
    session.answer(document, lambda: _show(terms))


@leader.command()
@click.option("--to", default="", metavar="NAME", help="Who shall lead; default: by preference.")
@common
def transfer(session: Session, to: str) -> None:
    """The leader gives the lead to another coordinator; jobs go on, decisions pause for moments.

    The order is a durable command: it is in the ledger before the leader steps down.

    \b
    Examples:
      outrider leader transfer
      outrider leader transfer --to c2
    """
    from msgspec.structs import replace

    from idl.members import merged
    from idl.records import TransferLeader
    from outrider.cli.orders import give_orders

    view = session.view()
    members = merged(view.state.members, session.settings.coordinators)
    if to:
        replace(session.settings, coordinators=members).coordinator(to)
    if len(members) < 2:
        raise ExitError(JOB_FAILED, "there is one coordinator alone: nobody could take over")
    before, term = view.leader, view.state.term
    give_orders(session, view, {to or "transfer": TransferLeader(to=to)})
    _await_term(view, term)
    document = {"from": before, "leader": view.leader, "term": view.state.term}

    def human() -> None:
        click.echo(f"{view.leader} leads in term {view.state.term} ({before} led)")

    session.answer(document, human)
    if to and view.leader != to:
        raise ExitError(JOB_FAILED, f"{view.leader} was elected instead of {to}: is {to} running?")


def _await_term(view: "LedgerView", term: int) -> None:
    deadline = time.monotonic() + TRANSFER_TIMEOUT_S
    while view.state.term <= term:
        if time.monotonic() > deadline:
            raise ExitError(
                TIMED_OUT,
                f"the leader stepped down and nobody took over within {TRANSFER_TIMEOUT_S:g} s; "
                "see `outrider status` and the coordinators' logs",
            )
        time.sleep(POLL_S)
        view.advance()
