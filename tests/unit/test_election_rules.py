"""The election, one rule a test: real `Election`s, a network that the test holds in its hand."""

import heapq
import itertools
from collections.abc import Callable

import pytest

from controlplane.core import events as e
from controlplane.core.election import Election, Standing
from controlplane.core.membership import Member, Voters
from controlplane.core.reach import CUT_MS, HOLD_MS
from controlplane.core.silence import ElectionTiming
from dataplane.core.state import PoolState
from idl.control import Ballot, BallotReply, Beacon
from idl.errors import ConfigError
from idl.ids import CoordinatorId
from idl.ledger import LedgerEntry, TermStarted
from idl.members import CoordinatorPeer

TIMING = ElectionTiming(heartbeat_ms=50, timeout_ms=500)
ROLE = "scheduler/main"


class Net:
    """Members, messages of 1 ms, links that can be cut one way, and a ledger of terms."""

    def __init__(self, size: int, seed: int = 1, preference: dict[str, int] | None = None) -> None:
        self.now, self.seed, self.count = 0, seed, 0
        names = [f"c{n}" for n in range(1, size + 1)]
        self.members = tuple(
            Member(name=name, preference=(preference or {}).get(name, 0)) for name in names
        )
        self.cut: set[tuple[str, str]] = set()
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.ledger = PoolState()
        self.won: list[tuple[int, str, int]] = []
        self.whys: list[tuple[str, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.shown: list[Voters] = []
        self.cut_off: set[str] = set()
        """Members that do not reach Kafka."""
        self.probes: list[str] = []
        self.ballots: list[str] = []
        self.live: dict[str, Election] = {}
        for name in names:
            self.start(name)

    def start(self, name: str) -> None:
        self.count += 1
        self.live[name] = Election(
            ROLE, name, self.count, self.members, TIMING, seed=self.seed * 100 + self.count,
            now_ms=self.now,
        )  # fmt: skip
        self.step(name, e.LedgerAdvanced(term=self.ledger.term, next_offset=0))
        self.wake(name, self.live[name])

    def kill(self, name: str, *, hint: bool) -> None:
        del self.live[name]
        for peer in list(self.live) if hint else ():
            self.after(2, lambda peer=peer: self.step(peer, e.PeerGone(peer=name)))  # type: ignore[misc]

    def after(self, delay_ms: int, what: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now + delay_ms, self.count, what))

    def wake(self, name: str, election: Election) -> None:
        if self.live.get(name) is election:
            self.step(name, e.Tick())
            soon = max(election.next_wakeup_ms(self.now) - self.now, 1)
            self.after(min(soon, 20), lambda: self.wake(name, election))

    def run(self, ms: int) -> "Net":
        until = self.now + ms
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
        self.now = until
        return self

    def step(self, name: str, event: e.ElectionEvent) -> None:
        if name not in self.live:
            return
        for effect in self.live[name].step(event, self.now):
            match effect:
                case e.SendBallot():
                    self.ballots.append(f"{name} {effect.ballot.kind} {effect.ballot.term}")
                    self.send(name, e.BallotReceived(ballot=effect.ballot))
                case e.SendBallotReply():
                    self.send(name, e.BallotReplyReceived(reply=effect.reply))
                case e.SendBeacon():
                    self.send(name, e.BeaconReceived(beacon=effect.beacon))
                case e.TakeRole():
                    self.won.append((self.now, name, effect.term))
                    self.whys.append((name, effect.why))
                    self.after(2, lambda n=name, t=effect.term: self.append(n, t))  # type: ignore[misc]
                case e.ProbeLedger():
                    self.probes.append(name)
                    self.after(5, lambda n=name: self.probed(n))  # type: ignore[misc]
                case e.ShowVoters():
                    self.shown.append(effect.voters)
                case e.LoseRole():
                    self.lost.append((name, effect.reason))

    def append(self, name: str, term: int) -> None:
        """`TermStarted` reaches the ledger; everybody reads it."""
        if name in self.cut_off:
            self.after(50, lambda: self.step(name, e.KafkaShown(stalled=True)))
            return
        incarnation = self.live[name].incarnation if name in self.live else 0
        offset = self.ledger.next_offset
        entry = LedgerEntry(
            term=term, leader=name, incarnation=incarnation, seq=1, at_ms=self.now,
            decisions=(TermStarted(pool="main", previous_term=self.ledger.term),),
        )  # fmt: skip
        if not self.ledger.apply(offset, entry).valid:
            self.step(name, e.StepDown(reason="void"))
        for reader in list(self.live):
            self.step(reader, e.LedgerAdvanced(term=self.ledger.term, next_offset=offset + 1))

    def probed(self, name: str) -> None:
        self.step(name, e.LedgerProbed(reached=name not in self.cut_off))

    def stall(self, *names: str) -> None:
        """These do not reach Kafka any more; a leader among them notices."""
        self.cut_off = set(names)
        for name in self.leaders:
            self.step(name, e.KafkaShown(stalled=name in names))

    def send(self, sender: str, event: e.ElectionEvent) -> None:
        for to in self.live:
            if to != sender and (sender, to) not in self.cut:
                self.after(1, lambda to=to: self.step(to, event))  # type: ignore[misc]

    @property
    def leaders(self) -> list[str]:
        return [name for name, x in self.live.items() if x.standing is Standing.LEADER]

    def split(self, *groups: tuple[str, ...]) -> None:
        side = {name: number for number, group in enumerate(groups) for name in group}
        names = [member.name for member in self.members]
        self.cut = {(a, b) for a in names for b in names if side[a] != side[b]}


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


def follower_of_c1(net: Net) -> Election:
    election = net.live["c3"]
    assert election.leader == "c1"
    return election


def answer(election: Election, ballot: Ballot, now: int) -> bool:
    out = election.step(e.BallotReceived(ballot=ballot), now)
    (reply,) = [x.reply for x in out if isinstance(x, e.SendBallotReply)]
    return reply.granted


PRE_VOTE = Ballot(kind="pre_vote", role=ROLE, term=2, candidate="c2", incarnation=2, round=9)


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


# --- membership (ADR 0012) ----------------------------------------------------------------------


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


# --- a leader that alone is cut off from Kafka ----------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_leader_that_alone_does_not_reach_kafka_hands_over(size: int) -> None:
    net = Net(size).run(2_000 + HOLD_MS)
    net.stall("c1")
    net.run(CUT_MS - 100)
    assert net.leaders == ["c1"]
    net.run(1_000)
    assert net.leaders == ["c2"]
    assert net.lost == [("c1", "it alone cannot reach Kafka")]
    net.run(30_000)
    assert net.leaders == ["c2"] and len(net.won) == 2, "the one cut off stays quiet"


@pytest.mark.parametrize("reaching", [(), ("c3",)])
def test_a_kafka_that_stalls_for_all_or_most_moves_nothing(reaching: tuple[str, ...]) -> None:
    net = Net(5).run(2_000 + HOLD_MS)
    net.stall(*(f"c{n}" for n in range(1, 6) if f"c{n}" not in reaching))
    net.run(60_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_clients_that_find_a_broker_again_at_different_times_move_nothing() -> None:
    net = Net(3).run(2_000 + HOLD_MS)
    net.stall("c1", "c2", "c3")
    net.run(9_000)
    net.cut_off = {"c1"}
    net.run(1_400)
    net.stall()
    net.run(10_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_an_append_that_fails_where_the_broker_answers_moves_nothing() -> None:
    """Too few replicas in sync, say: no other could append either."""
    net = Net(3).run(2_000 + HOLD_MS)
    net.step("c1", e.KafkaShown(stalled=True))
    net.run(60_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_nobody_is_asked_while_there_is_no_doubt() -> None:
    net = Net(3).run(60_000)
    assert net.probes == []
    net.stall("c1", "c2", "c3")
    net.run(10_000)
    assert set(net.probes) == {"c1", "c2", "c3"} and len(net.probes) < 3 * 22
    net.stall()
    net.run(1_000)
    net.probes.clear()
    net.run(10_000)
    assert net.probes == []


def test_a_new_leader_keeps_the_role_for_a_while_whatever_it_reaches() -> None:
    """Cut off in turns, they do not pass the role on faster than that."""
    net = Net(3).run(2_000)
    for _ in range(60):
        net.stall(*net.leaders)
        net.run(1_000)
    gaps = [after - before for (before, *_), (after, *_) in itertools.pairwise(net.won)]
    assert len(gaps) >= 4 and min(gaps) >= HOLD_MS


def test_one_that_is_cut_off_stands_last() -> None:
    net = Net(3).run(2_000 + HOLD_MS)
    net.stall("c1", "c2")
    net.run(1_000)
    net.kill("c1", hint=True)
    net.run(200)
    assert net.leaders == ["c3"], "c2 is before it in rank, and does not reach Kafka"
    net = Net(3).run(2_000 + HOLD_MS)
    net.stall("c1", "c2", "c3")
    net.run(1_000)
    net.kill("c1", hint=True)
    net.run(200)
    assert net.leaders, "where nobody does, somebody leads all the same"
