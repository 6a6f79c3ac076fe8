"""Real `Election`s and a network that the test holds in its hand."""

import heapq
from collections.abc import Callable

from controlplane.core import events as e
from controlplane.core.election import Election, Standing
from controlplane.core.membership import Member, Voters
from controlplane.core.silence import ElectionTiming
from dataplane.core.state import PoolState
from idl.control import Ballot
from idl.ledger import LedgerEntry, TermStarted

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


def follower_of_c1(net: Net) -> Election:
    election = net.live["c3"]
    assert election.leader == "c1"
    return election


def answer(election: Election, ballot: Ballot, now: int) -> bool:
    out = election.step(e.BallotReceived(ballot=ballot), now)
    (reply,) = [x.reply for x in out if isinstance(x, e.SendBallotReply)]
    return reply.granted


PRE_VOTE = Ballot(kind="pre_vote", role=ROLE, term=2, candidate="c2", incarnation=2, round=9)
