"""Handing the lead over, and what the next leader knows of the last one's end."""

import pytest

from controlplane.core import events as e
from idl import ledger as d
from idl.control import BallotReply
from idl.records import TransferLeader
from tests.unit.core_builders import Hand, names, seen, spec
from tests.unit.election_net import TIMING, Net
from tests.unit.test_core_membership import peers


def led(size: int = 3) -> Net:
    net = Net(size).run(3_000)
    assert net.won[-1][1] == "c1"
    return net


def test_a_successor_stands_before_higher_ranks() -> None:
    net = led()
    net.step("c1", e.StepDown(reason="transfer ordered", to="c3"))
    begun = net.now
    net.run(1_000)
    assert [(name, why) for name, why in net.whys[1:]] == [
        ("c3", "c1 stepped down: transfer ordered")
    ]
    assert net.won[-1][0] - begun <= 10, "a few messages of 1 ms"


def test_a_successor_that_is_gone_costs_a_moment() -> None:
    net = led()
    net.kill("c3", hint=False)
    net.step("c1", e.StepDown(reason="transfer ordered", to="c3"))
    begun = net.now
    net.run(1_000)
    most_ms = TIMING.successor_head_start_ms + 2 * TIMING.stagger_ms + 10
    assert net.won[-1][1] == "c2" and net.won[-1][0] - begun <= most_ms


def test_a_successor_that_is_late_is_waited_for() -> None:
    net = led()
    out = net.live["c1"].step(e.StepDown(reason="transfer ordered", to="c3"), net.now)
    (beacon,) = [one.beacon for one in out if isinstance(one, e.SendBeacon)]
    c2 = net.live["c2"]
    c2.step(e.BeaconReceived(beacon=beacon), net.now)
    wait_ms = TIMING.successor_head_start_ms
    assert wait_ms > 2 * TIMING.stagger_ms, "than where nobody was named"
    assert not c2.step(e.Tick(), net.now + wait_ms)
    assert c2.step(e.Tick(), net.now + wait_ms + TIMING.stagger_ms)


def test_without_a_wish_rank_decides() -> None:
    net = led()
    net.step("c1", e.StepDown(reason="shutdown"))
    net.run(1_000)
    assert net.whys[1:] == [("c2", "c1 stepped down: shutdown")]


@pytest.mark.parametrize(
    ("hint", "why"), [(True, "the process of c1 is gone"), (False, "c1 was not heard")]
)
def test_the_next_leader_says_why_the_last_one_ended(hint: bool, why: str) -> None:
    net = led()
    assert net.whys == [("c1", "nobody was heard")]
    net.kill("c1", hint=hint)
    net.run(3_000)
    assert net.whys[1:] == [("c2", why)]


def test_one_that_just_started_knows_from_the_ledger_who_was_not_heard() -> None:
    election = Net(3).live["c2"]
    election.step(e.LedgerAdvanced(term=4, next_offset=9, leader="c3"), 1)
    out = election.step(e.Tick(), 10_000)
    ballot = next(x.ballot for x in out if isinstance(x, e.SendBallot))
    for kind in ("pre_vote", "vote"):
        reply = BallotReply(
            kind=kind, role=ballot.role, term=5, candidate="c2", voter="c1", granted=True,
            candidate_incarnation=ballot.incarnation, round=ballot.round, voter_term=4,
        )  # fmt: skip
        out = election.step(e.BallotReplyReceived(reply=reply), 10_002)
        ballot = next((x.ballot for x in out if isinstance(x, e.SendBallot)), ballot)
    assert [x.why for x in out if isinstance(x, e.TakeRole)] == ["c3 was not heard"]


def test_the_order_is_in_the_ledger_before_the_leader_steps_down() -> None:
    hand = Hand()
    hand.node(seen())
    decisions = hand.command(TransferLeader(to="c2"))
    assert names(decisions) == ["Commanded"]
    (resigned,) = hand.take(e.Resign)
    assert isinstance(resigned, e.Resign) and resigned.to == "c2"
    assert resigned.reason == "transfer ordered by tester"
    hand.step(e.SubmissionsRead(term=1, submissions=()))
    hand.submit(spec("late"))
    assert not hand.state.jobs, "what was undecided is the successor's"


def test_nobody_hands_over_to_one_who_does_not_exist() -> None:
    hand = Hand(members=peers(1, 2))
    (decision,) = hand.command(TransferLeader(to="typo" * 10_000))
    assert isinstance(decision, d.Commanded) and decision.command is None
    assert "is no coordinator (there: c1, c2)" in decision.refused and len(decision.refused) < 600
    assert not hand.take(e.Resign)
    hand.command(TransferLeader(to="c2"))
    assert hand.take(e.Resign)


def test_nobody_hands_over_to_himself() -> None:
    hand = Hand()
    (decision,) = hand.command(TransferLeader(to="c1"))
    assert isinstance(decision, d.Commanded) and decision.refused == "c1 leads already"
    assert not hand.take(e.Resign)


def test_an_idle_leader_shows_a_stall_that_its_reader_noticed() -> None:
    hand = Hand()
    hand.step(e.LedgerStalled(stalled=True, reason="no broker is connected"))
    assert hand.core.kafka_stalled and hand.core.kafka_stalled_since_ms == hand.now
    hand.step(e.LedgerStalled(stalled=False))
    assert not hand.core.kafka_stalled and hand.core.kafka_stalled_since_ms == 0
    shown = [x.stalled for x in hand.take(e.ShowKafka) if isinstance(x, e.ShowKafka)]
    assert shown == [True, False]


def test_an_append_that_is_overdue_is_a_stall_whatever_the_reader_says() -> None:
    hand = Hand()
    hand.now += 1
    submission = e.Submission(source=hand.next_source("q"), queue="default", spec=spec("a"))
    hand.step(e.SubmissionsRead(term=1, submissions=(submission,)))
    for _ in range(4):
        hand.now += 1_000
        hand.step(e.Tick())
    assert hand.core.kafka_stalled
    hand.step(e.LedgerStalled(stalled=False))
    assert hand.core.kafka_stalled
    hand.settle()
    assert not hand.core.kafka_stalled
