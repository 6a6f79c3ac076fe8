"""The membership: which changes are refused and why, and what the state and the agents learn."""

import pytest
from msgspec.structs import replace

from controlplane.core.membership import Voters, changed
from dataplane.core.snapshot import image_of, restored
from dataplane.core.state import PoolState
from idl.control import Intent
from idl.errors import InvariantBrokenError
from idl.ids import CoordinatorId
from idl.ledger import Capacity, Decision, LedgerEntry, MembersChanged, TermStarted
from idl.members import MEMBERS_MAX, NOT_SETTLED, CoordinatorPeer, Members, merged
from idl.records import AddMember, RemoveMember
from node_agent.core.attempts import (
    AgentCore,
    FollowMembers,
    HeartbeatDue,
    IntentReceived,
    SendStatus,
)


def peer(number: int) -> CoordinatorPeer:
    return CoordinatorPeer(name=CoordinatorId(f"c{number}"), dds_port=7_408 + 2 * number)


def peers(*numbers: int) -> Members:
    return tuple(map(peer, numbers))


def all_of(members: Members) -> Voters:
    names = tuple(member.name for member in members)
    return Voters(names, names)


FILE = peers(1, 2, 3)


def refusal(
    order: AddMember | RemoveMember, file: Members = FILE, voters: Voters | None = None
) -> str:
    decision, reason = changed(PoolState(), file, voters or all_of(file), order)
    assert (decision is None) == bool(reason)
    return reason


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (peer(3), "c3 is a member already"),
        (replace(peer(4), name=CoordinatorId("a b")), "is not a name"),
        (replace(peer(4), dds_port=7_410), "c1 is at 127.0.0.1:7410 already"),
        (replace(peer(4), dds_port=70_000), "not both ports"),
        (replace(peer(4), address='x"/><Peer'), "is not an address"),
        (replace(peer(4), address="host..example"), "is not an address"),
        (replace(peer(4), address=f"{'a' * 64}.example"), "is not an address"),
        (replace(peer(4), public_keys=("zz",)), "64 hex digits"),
        (replace(peer(4), public_keys=("ab" * 32,)), "all members have public keys, or none"),
    ],
)
def test_a_member_that_would_harm_is_refused(member: CoordinatorPeer, why: str) -> None:
    assert why in refusal(AddMember(member=member))


def test_a_change_is_exactly_one_member() -> None:
    decision, _ = changed(PoolState(), FILE, all_of(FILE), AddMember(member=peer(4)))
    assert decision == MembersChanged(version=1, members=peers(1, 2, 3, 4), added="c4")
    decision, _ = changed(PoolState(), FILE, all_of(FILE), RemoveMember(name="c1"))
    assert decision == MembersChanged(version=1, members=peers(2, 3), removed="c1")
    assert "there are c1, c2, c3" in refusal(RemoveMember(name="c9"))
    assert "only member" in refusal(RemoveMember(name="c1"), peers(1))
    many = peers(*range(1, MEMBERS_MAX + 1))
    assert "at most" in refusal(AddMember(member=peer(20)), many)


def test_a_change_waits_until_a_majority_knows_the_one_before() -> None:
    voters = Voters(("c1", "c2", "c3"), ("c1",))
    assert NOT_SETTLED in refusal(AddMember(member=peer(4)), voters=voters)


def test_a_change_after_which_nobody_could_be_elected_is_refused() -> None:
    two = Voters(("c1", "c2"), ("c1", "c2"))
    assert "only c1, c2 answer" in refusal(AddMember(member=peer(4)), voters=two)
    assert "only c2 answers" in refusal(RemoveMember(name="c1"), voters=two)
    assert refusal(RemoveMember(name="c3"), voters=two) == "", "the dead one may go"
    assert refusal(AddMember(member=peer(2)), peers(1), Voters(("c1",), ("c1",))) == ""


def state_with(*changes: MembersChanged) -> PoolState:
    state = PoolState()
    decisions: list[Decision] = [TermStarted(pool="main", previous_term=0), *changes]
    for seq, decision in enumerate(decisions, 1):
        entry = LedgerEntry(
            term=1, leader="c1", incarnation=1, seq=seq, at_ms=seq, decisions=(decision,)
        )
        assert state.apply(seq - 1, entry).valid
    return state


def test_the_state_its_hash_and_its_snapshot_know_the_members() -> None:
    before = state_with()
    state = state_with(
        MembersChanged(version=1, members=peers(1, 2, 3, 4), added="c4"),
        MembersChanged(version=2, members=peers(2, 3, 4), removed="c1"),
    )
    assert (state.members, state.members_version) == (peers(2, 3, 4), 2)
    assert state.state_hash() != before.state_hash() and state.digest != before.digest
    again = restored(image_of(state))
    assert again.members == state.members and again.state_hash() == state.state_hash()


@pytest.mark.parametrize(
    "second",
    [
        MembersChanged(version=3, members=peers(1, 2), removed="c3"),
        MembersChanged(version=2, members=peers(1), removed="c2"),
        MembersChanged(version=2, members=(), removed="c1"),
    ],
)
def test_two_changes_at_once_are_a_broken_ledger(second: MembersChanged) -> None:
    with pytest.raises(InvariantBrokenError, match="one change at a time"):
        state_with(MembersChanged(version=1, members=FILE), second)


def test_the_file_says_where_and_the_ledger_who() -> None:
    moved = replace(peer(2), address="elsewhere")
    assert merged((), FILE) == FILE
    assert merged(peers(2, 4), (peer(1), moved)) == (moved, peer(4))


def test_an_agent_follows_newer_members_and_says_so() -> None:
    core = AgentCore("main", "n1", 7, Capacity(cpu_millis=1, memory_bytes=1), frozenset())

    def told(version: int, term: int = 1) -> list[object]:
        intent = Intent(
            pool="main", node="n1", node_incarnation=7, term=term, leader="c1", items=(),
            members_version=version, members=peers(2, version),
        )  # fmt: skip
        return list(core.step(IntentReceived(intent), 0))

    assert told(3) == [FollowMembers(peers(2, 3))]
    assert told(3) == told(2) == []
    assert core.leader == "", "a standby may have told: it says nothing about who leads"
    core.term = 5
    assert told(9, term=4) == [], "an older term is refused, whatever it says"
    (effect,) = core.step(HeartbeatDue(), 0)
    assert isinstance(effect, SendStatus) and effect.status.members_version == 3
