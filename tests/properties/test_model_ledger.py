"""Exhaustive search of small scopes: whoever is elected whenever, the ledger has one history."""

import pytest

from chaos.sim import model_members
from chaos.sim.model import PLANTS, SCOPES, Model, planted
from chaos.sim.model_members import MembersModel, unsettled_allowed

STATES_MIN = 10_000
"""A scope that suddenly has fewer is not explored any more."""


@pytest.mark.parametrize("name", SCOPES)
def test_every_state_of_the_small_scope_is_safe(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Model(SCOPES[name]).explore()
    with capsys.disabled():
        print(
            f"\nmodel check, {name}: {result.states} states, {result.transitions} transitions, "
            f"{result.logs} logs, {result.seconds:.0f} s"
        )
    assert result.broken is None
    assert result.states > STATES_MIN


@pytest.mark.parametrize("name", PLANTS)
def test_the_search_finds_a_rule_with_a_hole(name: str) -> None:
    with planted(name):
        result = Model(SCOPES["copies and a crash"]).explore()
    assert result.broken is not None
    assert len(result.broken.way) < 20


MEMBERS_STATES_MIN = 3_000


@pytest.mark.parametrize("name", model_members.SCOPES)
def test_memberships_that_can_both_elect_share_a_voter(name: str) -> None:
    result = MembersModel(model_members.SCOPES[name]).explore()
    assert result.broken is None
    assert result.states > MEMBERS_STATES_MIN


def test_the_search_finds_a_change_that_comes_too_soon() -> None:
    with unsettled_allowed():
        result = MembersModel(model_members.SCOPES["two are added"]).explore()
    assert result.broken is not None
    assert "do not meet" in result.broken.what
    assert len(result.broken.way) < 12
