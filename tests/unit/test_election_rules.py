"""The election, one rule a test."""

import pytest

from controlplane.core import events as e
from controlplane.core.election import Election, Standing
from controlplane.core.membership import Member
from idl.control import Ballot, BallotReply, Beacon
from idl.errors import ConfigError
from tests.unit.election_net import PRE_VOTE, ROLE, TIMING, Net, answer, follower_of_c1


def test_one_coordinator_leads_at_once_and_alone() -> None:
    net = Net(1)
    assert net.won == [(0, "c1", 1)]
    net.run(5_000)
    assert net.leaders == ["c1"] and len(net.won) == 1
    net.live["c1"].step(e.Tick(), net.now + 60_000)
    assert net.leaders == ["c1"], "alone, a long sleep deposes nobody"


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_one_leader_soon_and_then_peace(size: int, seed: int) -> None:
    net = Net(size, seed).run(1_500)
    assert len(net.leaders) == 1 and len(net.won) == 1
    assert all(x.leader == net.leaders[0] for x in net.live.values())
    net.run(10_000)
    assert len(net.won) == 1


def test_preference_then_name_decides_who_leads() -> None:
    assert Net(3).run(1_500).leaders == ["c1"]
    assert Net(3, preference={"c3": 1}).run(1_500).leaders == ["c3"]


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_dead_leader_with_a_hint_is_replaced_in_milliseconds(size: int, seed: int) -> None:
    net = Net(size, seed).run(2_000)
    killed_at = net.now
    net.kill(net.leaders[0], hint=True)
    net.run(100)
    assert len(net.leaders) == 1 and len(net.won) == 2
    assert net.won[1][0] - killed_at <= 10


def test_the_second_in_rank_stands_when_the_first_is_dead_too() -> None:
    net = Net(5).run(2_000)
    net.kill("c2", hint=True)
    net.run(100)
    net.kill("c1", hint=True)
    net.run(200)
    assert net.leaders == ["c3"]


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_leader_without_a_hint_is_replaced_after_its_lease(seed: int) -> None:
    net = Net(3, seed).run(2_000)
    killed_at = net.now
    net.kill(net.leaders[0], hint=False)
    net.run(2 * TIMING.timeout_ms + 100)
    assert len(net.leaders) == 1
    assert TIMING.timeout_ms <= net.won[1][0] - killed_at


def test_a_false_hint_at_one_voter_deposes_nobody() -> None:
    net = Net(3).run(2_000)
    net.step("c2", e.PeerGone(peer="c1"))
    net.run(3_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_a_leader_cut_off_steps_down_and_the_others_go_on() -> None:
    net = Net(5).run(2_000)
    net.split(("c1", "c2"), ("c3", "c4", "c5"))
    net.run(1_500)
    assert net.leaders == ["c3"] and net.lost[0][0] == "c1"
    assert "not renewed" in net.lost[0][1]
    net.cut = set()
    net.run(3_000)
    assert net.leaders == ["c3"], "who comes back disturbs nobody: pre-votes are refused"
    assert len(net.won) == 2


def test_a_minority_never_leads() -> None:
    net = Net(5)
    net.split(("c1", "c2"), ("c3", "c4"), ("c5",))
    net.run(10_000)
    assert net.won == []
    assert max(x.term for x in net.live.values()) == 0, "pre-votes spend no terms"


def test_a_leader_that_is_heard_and_hears_nothing_steps_down() -> None:
    net = Net(3).run(2_000)
    net.cut = {("c2", "c1"), ("c3", "c1")}
    net.run(2_000)
    assert "c1" not in net.leaders and len(net.leaders) == 1


def test_a_follower_that_hears_nothing_disturbs_nobody() -> None:
    net = Net(3).run(2_000)
    net.cut = {("c1", "c3"), ("c2", "c3")}
    net.run(5_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_a_hand_over_takes_milliseconds() -> None:
    net = Net(3).run(2_000)
    asked_at = net.now
    net.step("c1", e.StepDown(reason="shutdown"))
    net.run(50)
    assert net.leaders == ["c2"] and net.won[1][0] - asked_at <= 10
    net.run(5_000)
    assert net.leaders == ["c2"]


def test_a_higher_term_in_the_ledger_ends_the_role() -> None:
    net = Net(3).run(2_000)
    net.step("c1", e.LedgerAdvanced(term=7, next_offset=9))
    assert net.lost == [("c1", "the ledger is at term 7")]
    net.run(2_000)
    assert net.won[-1][2] == 8


def test_a_stalled_kafka_is_shown_and_is_no_reason_to_step_down() -> None:
    net = Net(3).run(2_000)
    out = net.live["c1"].step(e.KafkaShown(stalled=True), net.now)
    net.run(60)
    out = net.live["c1"].step(e.Tick(), net.now + 60)
    beacons = [x.beacon for x in out if isinstance(x, e.SendBeacon)]
    assert beacons and beacons[0].kafka == "stalled"
    assert net.leaders == ["c1"]


def test_one_that_has_not_caught_up_does_not_stand() -> None:
    election = Election(ROLE, "c1", 1, (Member(name="c1"),), TIMING, seed=1, now_ms=0)
    assert election.step(e.LedgerAdvanced(term=3, next_offset=5, caught_up=False), 5_000) == ()
    out = election.step(e.LedgerAdvanced(term=3, next_offset=9, caught_up=True), 5_001)
    assert [x.term for x in out if isinstance(x, e.TakeRole)] == [4]


def test_a_restarted_voter_waits_a_lease_out() -> None:
    net = Net(3).run(2_000)
    net.kill("c3", hint=False)
    net.start("c3")
    ballot = Ballot(kind="vote", role=ROLE, term=9, candidate="c2", incarnation=2, round=1)
    out = net.live["c3"].step(e.BallotReceived(ballot=ballot), net.now)
    (reply,) = [x.reply for x in out if isinstance(x, e.SendBallotReply)]
    assert not reply.granted and "waiting a lease out" in reply.reason


def test_a_voter_votes_once_per_term_and_repeats_its_vote() -> None:
    election = Net(5).live["c5"]
    granted = []
    for candidate in ("c1", "c2", "c1"):
        ballot = Ballot(kind="vote", role=ROLE, term=3, candidate=candidate, incarnation=1, round=1)
        out = election.step(e.BallotReceived(ballot=ballot), 600)
        granted += [x.reply.granted for x in out if isinstance(x, e.SendBallotReply)]
    assert granted == [True, False, True]


def test_two_elected_of_one_term_cost_a_term_and_nothing_else() -> None:
    """Voters without disk that restart may elect two of one term: the ledger takes the first."""
    net = Net(3)
    for name in ("c1", "c2"):
        net.append(name, 5)
    assert [t.leader for t in net.ledger.terms] == ["c1"]
    assert net.ledger.void_counts == {"not_the_leader": 1}
    net.run(3_000)
    assert len(net.leaders) == 1 and net.ledger.term == 6


@pytest.mark.parametrize("seed", range(30))
def test_under_any_weather_one_valid_leader_per_term_and_peace_afterwards(seed: int) -> None:
    import random

    rng = random.Random(seed)
    net = Net(rng.choice((3, 5)), seed)
    names = [member.name for member in net.members]
    for _ in range(12):
        match rng.randrange(5):
            case 0:
                net.cut = {(a, b) for a in names for b in names if rng.random() < 0.3}
            case 1:
                name = rng.choice(names)
                if name in net.live:
                    net.kill(name, hint=rng.random() < 0.5)
            case 2:
                for name in names:
                    if name not in net.live:
                        net.start(name)
            case 3:
                net.step(rng.choice(names), e.PeerGone(peer=rng.choice(names)))
            case 4:
                net.step(rng.choice(names), e.StepDown(reason="test"))
        net.run(rng.choice((20, 300, 1_000)))
    terms = [record.term for record in net.ledger.terms]
    assert terms == sorted(set(terms))
    net.cut = set()
    for name in names:
        if name not in net.live:
            net.start(name)
    net.run(5_000)
    assert len(net.leaders) == 1
    elected = len(net.won)
    net.run(10_000)
    assert len(net.won) == elected, "peace"


def test_strangers_and_other_roles_are_ignored() -> None:
    election = Net(3).live["c1"]
    ballot = Ballot(kind="vote", role=ROLE, term=9, candidate="x", incarnation=1, round=1)
    assert election.step(e.BallotReceived(ballot=ballot), 600) == ()
    beacon = Beacon(role="other", term=9, leader="c2", incarnation=1, lease_ms=9, ledger_offset=0)
    assert election.step(e.BeaconReceived(beacon=beacon), 600) == ()
    reply = BallotReply(
        kind="vote", role=ROLE, term=1, candidate="c1", candidate_incarnation=99, voter="c2",
        round=1, granted=True, voter_term=1,
    )  # fmt: skip
    election.step(e.BallotReplyReceived(reply=reply), 600)
    assert election.standing is not Standing.LEADER


def test_a_membership_without_me_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be once among"):
        Election(ROLE, "c9", 1, (Member(name="c1"),), TIMING, seed=1, now_ms=0)


def test_a_pre_vote_refused_for_the_leaders_sake_is_granted_when_the_leader_goes() -> None:
    net = Net(3).run(2_000)
    voter = follower_of_c1(net)
    assert not answer(voter, PRE_VOTE, net.now)
    out = voter.step(e.PeerGone(peer="c1"), net.now + 1)
    replies = [x.reply for x in out if isinstance(x, e.SendBallotReply)]
    assert [(r.candidate, r.granted) for r in replies] == [("c2", True)]


def test_a_beacon_that_arrives_after_the_hint_may_have_been_sent_before_it() -> None:
    net = Net(3).run(2_000)
    voter = follower_of_c1(net)
    beacon = Beacon(
        role=ROLE, term=1, leader="c1", incarnation=net.live["c1"].incarnation, lease_ms=500,
        ledger_offset=1,
    )  # fmt: skip
    voter.step(e.PeerGone(peer="c1"), net.now)
    voter.step(e.BeaconReceived(beacon=beacon), net.now + 1)
    assert answer(voter, PRE_VOTE, net.now + 2)
    voter.step(e.BeaconReceived(beacon=beacon), net.now + TIMING.heartbeat_ms + 1)
    assert not answer(voter, PRE_VOTE, net.now + TIMING.heartbeat_ms + 2), "the hint was false"


def test_a_term_that_the_ledger_has_seen_gets_no_vote() -> None:
    voter = Net(5).live["c5"]
    voter.step(e.LedgerAdvanced(term=5, next_offset=9), 600)
    vote = Ballot(kind="vote", role=ROLE, term=5, candidate="c1", incarnation=1, round=1)
    assert not answer(voter, vote, 600)


def test_of_two_that_stand_the_lower_rank_gives_way() -> None:
    net = Net(5)
    lower, higher = net.live["c4"], net.live["c2"]
    for election in (lower, higher):
        election.step(e.Tick(), 1_200)
        assert election.standing.value == "pre_candidate"
    for election, candidate in ((lower, "c2"), (higher, "c4")):
        ballot = Ballot(
            kind="pre_vote", role=ROLE, term=1, candidate=candidate, incarnation=1, round=1
        )
        assert answer(election, ballot, 1_201)
    assert (lower.standing.value, higher.standing.value) == ("follower", "pre_candidate")
