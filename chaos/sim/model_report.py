"""`simulate --model`: explores every scope, with and without bugs, and tells what it found."""

import json

import click

from chaos.sim import model_members
from chaos.sim.model import PLANTS, SCOPES, Model, Result, Scope, planted
from chaos.sim.model_members import MembersModel, unsettled_allowed

UNSETTLED = "ignores-unsettled"
"""The planted bug of the membership's scopes."""


def explored(*, wide: bool) -> dict[str, Result]:
    """By the name of the scope, or of the planted bug."""
    ledger = {"wide": Scope()} if wide else SCOPES
    members = {"wide, members": model_members.WIDE} if wide else model_members.SCOPES
    rows = {name: Model(scope).explore() for name, scope in ledger.items()}
    rows |= {name: MembersModel(scope).explore() for name, scope in members.items()}
    for name in PLANTS:
        with planted(name):
            rows[name] = Model(SCOPES["copies and a crash"]).explore()
    with unsettled_allowed():
        rows[UNSETTLED] = MembersModel(model_members.SCOPES["two are added"]).explore()
    return rows


def report(*, wide: bool, as_json: bool) -> bool:
    """Explores and prints. True where all is as it should be."""
    rows = explored(wide=wide)
    bugs = {*PLANTS, UNSETTLED}
    good = all((row.broken is None) == (name not in bugs) for name, row in rows.items())
    if as_json:
        click.echo(json.dumps({name: row._asdict() for name, row in rows.items()}))
        return good
    for name, row in rows.items():
        verdict = row.broken.what if row.broken else "every property holds"
        click.echo(f"{name:<20}{row.states:>9} states {row.transitions:>9} transitions "
                   f"{row.seconds:6.1f} s  {verdict}")  # fmt: skip
        for step in row.broken.way if row.broken else ():
            click.echo(f"{'':<22}{step}")
    return good
