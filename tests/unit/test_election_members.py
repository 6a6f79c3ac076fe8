"""The election while the membership changes (ADR 0012)."""

import pytest

from controlplane.core import events as e
from controlplane.core.membership import Member, Voters
from idl.control import Ballot
from idl.ids import CoordinatorId
from idl.members import CoordinatorPeer
from tests.unit.election_net import ROLE, TIMING, Net, answer


def adopt(net: Net, version: int, *names: str, to: tuple[str, ...] = ()) -> None:
    """These read in the ledger that the members are `names`; a new one is started."""
    members = tuple(CoordinatorPeer(name=CoordinatorId(n), dds_port=7_410) for n in names)
    for name in names:
        if name not in net.live and not to:
            net.members = (*net.members, Member(name=name))
            net.start(name)
    for name in to or tuple(net.live):
        net.step(name, e.MembersAdopted(version=version, members=members))


def test_an_added_member_votes_and_is_counted() -> None:
    net = Net(3).run(2_000)
    adopt(net, 1, "c1", "c2", "c3", "c4")
    net.run(1_000)
    assert net.leaders == ["c1"]
    net.kill("c1", hint=True)
    net.run(200)
    assert net.leaders == ["c2"]
    net.kill("c2", hint=True)
    net.run(3_000)
    assert net.leaders == [], "two of four are no majority"


def test_a_removed_leader_hands_over_at_once_and_stays_quiet() -> None:
    net = Net(4).run(2_000)
    asked_at = net.now
    adopt(net, 1, "c2", "c3", "c4")
    net.run(100)
    assert net.leaders == ["c2"] and net.won[1][0] - asked_at <= 10
    assert net.lost == [("c1", "it was removed from the membership")]
    assert net.whys[1] == ("c2", "c1 stepped down: it was removed from the membership")
    net.kill("c2", hint=True)
    net.run(5_000)
    assert net.leaders == ["c3"] and not net.live["c1"].is_member
    assert net.live["c1"].leader == "c3", "it follows, and would be warm if it were added again"


def test_a_removed_leader_that_has_not_read_it_is_replaced_after_its_lease() -> None:
    net = Net(4).run(2_000)
    adopt(net, 1, "c2", "c3", "c4", to=("c2", "c3", "c4"))
    net.run(2 * TIMING.timeout_ms + 200)
    assert net.leaders == ["c2"]
    assert net.lost == [("c1", "the lease was not renewed by a majority")]


def test_who_counts_by_an_older_membership_gets_no_vote() -> None:
    net = Net(3)
    adopt(net, 1, "c1", "c2", "c3", to=("c3",))
    old = Ballot(kind="vote", role=ROLE, term=3, candidate="c2", incarnation=2, round=1)
    assert not answer(net.live["c3"], old, 600)
    new = Ballot(
        kind="vote", role=ROLE, term=3, candidate="c2", incarnation=2, round=1, members_version=1
    )
    assert answer(net.live["c3"], new, 600)


def test_one_alone_takes_a_second_and_needs_it_from_then_on() -> None:
    net = Net(1).run(5_000)
    adopt(net, 1, "c1", "c2")
    net.run(3_000)
    assert net.leaders == ["c1"] and len(net.won) == 1
    net.kill("c2", hint=True)
    net.run(3_000)
    assert net.leaders == []


def test_a_leader_says_who_answers_and_who_knows_the_newest_membership() -> None:
    net = Net(3).run(2_000)
    adopt(net, 1, "c1", "c2", "c3", to=("c1", "c2"))
    net.run(200)
    assert net.shown[-1] == Voters(("c1", "c2", "c3"), ("c1", "c2"))
    net.kill("c3", hint=True)
    net.run(1_000)
    assert net.shown[-1] == Voters(("c1", "c2"), ("c1", "c2"))


@pytest.mark.parametrize("seed", range(20))
def test_changes_in_any_weather_leave_one_leader(seed: int) -> None:
    """Members come and go one at a time, read late and in different moments, while links break."""
    import random

    rng = random.Random(seed)
    net = Net(3, seed).run(1_500)
    members = ["c1", "c2", "c3"]
    for version in range(1, 9):
        if len(members) > 2 and rng.random() < 0.5:
            members.remove(rng.choice(members))
        else:
            members.append(f"c{10 + version}")
        for name in members:
            if name not in net.live:
                net.members = tuple(Member(name=m) for m in members)
                net.start(name)
        late = tuple(name for name in net.live if rng.random() < 0.4)
        prompt = tuple(name for name in net.live if name not in late)
        adopt(net, version, *members, to=prompt)
        every = tuple(net.live)
        net.cut = {(a, b) for a in every for b in every if rng.random() < 0.15}
        net.run(rng.choice((20, 300, 900)))
        adopt(net, version, *members, to=late)
        net.cut = set()
        net.run(rng.choice((20, 300)))
    net.run(5_000)
    assert len(net.leaders) == 1 and net.leaders[0] in members
    elected = len(net.won)
    net.run(10_000)
    assert len(net.won) == elected, "peace"
    terms = [record.term for record in net.ledger.terms]
    assert terms == sorted(set(terms))
