"""`members`: who the coordinators are; `members add`, `members remove` (ADR 0012)."""

import time
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from outrider.cli.common import Session, common, print_table
from outrider.cli.exits import ExitError

if TYPE_CHECKING:
    from idl.records import Command
    from outrider.client.view import LedgerView

SETTLE_S: Final = 5.0
"""How long a change is asked for again while the one before is not known to a majority yet: that
takes a heartbeat, and a new leader's election before it."""
AGAIN_S: Final = 0.3


def member_documents(session: Session, view: "LedgerView") -> list[dict[str, Any]]:
    """The members in force, by name."""
    from idl.members import merged

    members = merged(view.state.members, session.settings.coordinators)
    found = [{**msgspec.to_builtins(m), "leads": m.name == view.leader} for m in members]
    return sorted(found, key=lambda document: str(document["name"]))


def _answer(session: Session, view: "LedgerView") -> None:
    members, version = member_documents(session, view), view.state.members_version
    rows = [
        (
            doc["name"],
            "leads" if doc["leads"] else "",
            f"{doc['address']}:{doc['dds_port']}",
            doc["hint_port"] or "",
            doc["preference"],
            len(doc["public_keys"]) or "shared secret",
        )
        for doc in members
    ]

    def human() -> None:
        print_table(("NAME", "ROLE", "DDS", ">HINTS", ">PREFERENCE", ">KEYS"), rows)
        source = f"membership {version} of the ledger" if version else "as the cluster file has it"
        click.echo(source)

    session.answer({"version": version, "members": members}, human)


@click.group(invoke_without_command=True)
@common
def members(session: Session) -> None:
    """The coordinators that elect the leader, and where they are.

    The cluster file gives the first membership; changes are in the ledger, one at a time.

    \b
    Examples:
      outrider members
      outrider members add c4 --address host-4 --dds-port 9160 --hint-port 9100 --public-key 9f…
      outrider members remove c1
    """
    if click.get_current_context().invoked_subcommand is None:
        _answer(session, session.view())


@members.command()
@click.argument("name")
@click.option("--address", required=True, help="Host name or address, as in the cluster file.")
@click.option("--dds-port", required=True, type=int, help="UDP port of its DDS participant.")
@click.option("--hint-port", default=0, show_default=True, help="TCP port of its hints; 0: none.")
@click.option("--preference", default=0, show_default=True, help="Higher stands earlier.")
@click.option("--public-key", multiple=True, metavar="HEX", help="Ed25519, newest first.")
@common
def add(
    session: Session,
    name: str,
    address: str,
    dds_port: int,
    hint_port: int,
    preference: int,
    public_key: tuple[str, ...],
) -> None:
    """One more coordinator. Start its process first, with a cluster file that lists it: it follows
    the leader, reads the ledger, and is warm when it becomes a member.

    \b
    Examples:
      outrider members add c4 --address host-4 --dds-port 9160 --hint-port 9100 --public-key 9f…
    """
    from idl.ids import CoordinatorId
    from idl.members import CoordinatorPeer
    from idl.records import AddMember

    member = CoordinatorPeer(
        name=CoordinatorId(name), address=address, dds_port=dds_port, hint_port=hint_port,
        preference=preference, public_keys=tuple(key.lower() for key in public_key),
    )  # fmt: skip
    _order(session, name, AddMember(member=member))


@members.command()
@click.argument("name")
@common
def remove(session: Session, name: str) -> None:
    """One coordinator less. A leader that is removed hands over; its process may be stopped then.

    \b
    Examples:
      outrider members remove c1
    """
    from idl.records import RemoveMember

    _order(session, name, RemoveMember(name=name))


def _order(session: Session, name: str, command: "Command") -> None:
    from idl.members import NOT_SETTLED
    from outrider.cli.orders import give_orders

    view = session.view()
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            give_orders(session, view, {name: command})
        except ExitError as error:
            if NOT_SETTLED not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)
        else:
            _answer(session, view)
            return
