"""Who tries to lead: terms, pre-votes, votes and a lease, decided by a majority of coordinators.

After Raft (Ongaro & Ousterhout 2014; the pre-vote of Ongaro's thesis, §9.6) without its log: which
leader *counts* is decided by the order of the ledger (`dataplane.core.validity`, ADR 0001), so
nothing here needs a disk. Two elected at once cost a wasted term, not a wrong decision; all that
this machine has to give is one willing leader soon, and peace while it lives.

* A leader renews its lease by a majority at every heartbeat and steps down when that fails.
* Voters refuse others while they hear a live leader within its lease, unless a hint says that its
  process is gone (`PeerGone`), or it says itself that it steps down.
* Waiting times depend on `rank` (preference, then name), so that two candidates rarely split.
* A Kafka that takes no appends is no reason to step down: no other could append either. Only a
  leader that alone does not reach it hands over (`controlplane.core.reach`).
* On a machine that does not run its processes in time the timeout is stretched, and who was late
  itself concludes nothing from what it did not hear (`controlplane.core.silence`, ADR 0014).
* Who is a member says the ledger, from its first change on (ADR 0012). A voter refuses a candidate
  that counts votes by an older membership than its own.
"""

import hashlib
from enum import StrEnum
from typing import Literal

from controlplane.core.events import (
    BallotReceived,
    BallotReplyReceived,
    Barred,
    BeaconReceived,
    ElectionEffect,
    ElectionEvent,
    KafkaShown,
    LedgerAdvanced,
    LedgerProbed,
    LoseRole,
    MembersAdopted,
    PeerGone,
    ProbeLedger,
    SendBallot,
    SendBallotReply,
    SendBeacon,
    ShowVoters,
    StepDown,
    TakeRole,
    Tick,
)
from controlplane.core.membership import Member, Voters, majority
from controlplane.core.reach import HOLD_MS, Reach
from controlplane.core.silence import STRETCH_MAX, ElectionTiming, Silence
from idl.control import Ballot, BallotReply, Beacon
from idl.errors import ConfigError

BallotKind = Literal["pre_vote", "vote", "renew"]


class Standing(StrEnum):
    """Of this coordinator in the election."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre_candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


def _fraction(seed: int, number: int) -> float:
    """A number in [0, 1) that looks random and is not: the core holds no generator."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Election:
    """One coordinator's part in the election of one role."""

    def __init__(
        self,
        role: str,
        me: str,
        incarnation: int,
        members: tuple[Member, ...],
        timing: ElectionTiming,
        seed: int,
        now_ms: int,
    ) -> None:
        names = [member.name for member in members]
        if me not in names or len(set(names)) != len(names):
            raise ConfigError(f"coordinator {me!r} must be once among the members {names}")
        self.role, self.me, self.incarnation = role, me, incarnation
        self.timing = timing
        self._silence = Silence(timing, now_ms)
        self.timeout_ms = timing.timeout_ms
        """The timeout as it is now: the configured one, or stretched. In force for lease, promise
        and patience alike."""
        self._members_version = 0
        self._set_members(members)
        self._seed, self._draws = seed, 0
        self.standing = Standing.FOLLOWER
        self.term = 0
        """Highest term seen: in ballots, replies, beacons or the ledger."""
        self._ended = ""
        """What ended the last lead, as far as this process knows; "" while a leader is heard."""
        self.leader = ""
        """Whom this coordinator believes to lead; "" for nobody."""
        self.leader_incarnation = 0
        self._heard_ms = now_ms
        self._voted: tuple[int, str, int] | None = None
        self._round = 0
        self._resend_ms = 0
        self._standing_for = 0
        """The term asked for as (pre-)candidate, or led."""
        self._granted: set[str] = set()
        self._lease_until_ms = self._renewed_ms = 0
        """When the renewal that a majority granted last was sent."""
        self._renewals: dict[int, tuple[int, set[str]]] = {}
        self._renewed_by: dict[str, tuple[int, int]] = {}
        """Voter → when it last renewed the lease, and which membership it knows."""
        self._voters = Voters()
        # A restarted voter has forgotten whom it promised its peace to: it waits a lease out.
        self._promised_until_ms = now_ms + timing.timeout_ms if len(names) > 1 else now_ms
        self._gone_ms: int | None = None
        """When a hint said that the leader's process is gone; None without a hint."""
        self._refused: dict[str, Ballot] = {}
        self._postponed = False
        self._ledger_offset = self._ledger_term = 0
        self._ledger_leader = ""
        self._caught_up = False
        self._kafka_stalled_ms: int | None = None
        self._reach = Reach()
        self._leader_stalled = False
        """The leader's last beacon says that Kafka takes no appends."""
        self._led_since_ms = 0
        self._digest = ""
        self._barred = ""
        self._out: list[ElectionEffect] = []
        self._stand_at_ms = now_ms if len(names) == 1 else self._patience_end(now_ms)

    # --- the interface ------------------------------------------------------------------------

    def step(self, event: ElectionEvent, now_ms: int) -> tuple[ElectionEffect, ...]:
        """Takes one event; returns what to do, in order. `now_ms` never goes back."""
        self.timeout_ms = self._silence.timeout_ms(now_ms)
        self._excuse(self._silence.grace_ms(now_ms), now_ms)
        match event:
            case BallotReceived():
                self._ballot(event.ballot, now_ms)
            case BallotReplyReceived():
                self._reply(event.reply, now_ms)
            case BeaconReceived():
                self._beacon(event.beacon, now_ms)
            case PeerGone():
                self._peer_gone(event.peer, now_ms)
            case LedgerAdvanced():
                self._ledger_advanced(event, now_ms)
            case KafkaShown():
                self._kafka_stalled_ms = now_ms if event.stalled else None
            case StepDown():
                if self.standing is Standing.LEADER:
                    self._step_down(event.reason, now_ms, event.to)
            case Barred():
                self._barred = event.reason
            case LedgerProbed():
                self._reach.answered(event.reached, now_ms)
            case MembersAdopted():
                self._adopt_members(event, now_ms)
            case Tick():
                pass
        self._timers(now_ms)
        self._silence.wake_by(self.next_wakeup_ms(now_ms))
        out, self._out = tuple(self._out), []
        return out

    def next_wakeup_ms(self, now_ms: int) -> int:
        """Epoch ms at which a `Tick` is due."""
        if self.standing is Standing.LEADER:
            times = [self._resend_ms]
            if self._majority > 1:
                times.append(self._lease_until_ms)
        elif self.standing is Standing.FOLLOWER:
            times = [self._stand_at_ms]
        else:
            times = [self._resend_ms, self._stand_at_ms]
        if not self._may_stand and self.standing is Standing.FOLLOWER:
            times = [now_ms + self.timing.timeout_ms]  # LedgerAdvanced wakes it sooner
        if self._in_doubt:
            times.append(self._reach.next_ask_ms(now_ms))
        return max(now_ms + 1, min(times))

    @property
    def is_member(self) -> bool:
        """One that is none neither stands nor votes; it follows the leader and stays warm."""
        return self.me in self._order

    # --- the membership -----------------------------------------------------------------------

    def _set_members(self, members: tuple[Member, ...]) -> None:
        order = sorted(members, key=lambda member: (-member.preference, member.name))
        self._order = [member.name for member in order]
        self._majority = majority(len(order))

    def _adopt_members(self, event: MembersAdopted, now_ms: int) -> None:
        if event.version <= self._members_version:
            return
        was_alone = self._majority == 1
        self._members_version, self._voters = event.version, Voters()
        self._set_members(
            tuple(Member(name=p.name, preference=p.preference) for p in event.members)
        )
        if self.standing is Standing.LEADER:
            if not self.is_member:
                self._step_down("it was removed from the membership", now_ms)
            elif was_alone:
                self._lease_until_ms = now_ms + self.timeout_ms  # needed from now on
        elif self.standing is not Standing.FOLLOWER:
            self._follow(now_ms)  # what was asked was asked by another membership

    # --- time ---------------------------------------------------------------------------------

    def _excuse(self, grace_ms: int, now_ms: int) -> None:
        """This process was late: what it has not heard may lie in its sockets, so it listens."""
        if not grace_ms:
            return
        if self.standing is Standing.LEADER:
            self._lease_until_ms = max(self._lease_until_ms, now_ms + grace_ms)
        elif self.standing is Standing.FOLLOWER and self.leader and self._gone_ms is None:
            self._stand_at_ms = max(self._stand_at_ms, now_ms + grace_ms)

    @property
    def excuses(self) -> int:
        """How often this process was late enough to conclude nothing from silence."""
        return self._silence.excuses

    def _timers(self, now_ms: int) -> None:
        if self._in_doubt and self._reach.ask(now_ms):
            self._out.append(ProbeLedger())
        if self.standing is Standing.LEADER:
            self._mind_reach(now_ms)
        if self.standing is Standing.LEADER:
            if now_ms >= self._lease_until_ms and self._majority > 1:  # alone: nobody else may lead
                self._step_down("the lease was not renewed by a majority", now_ms)
            elif now_ms >= self._resend_ms:
                self._heartbeat(now_ms)
            return
        if now_ms >= self._stand_at_ms and self._may_stand:
            self._stand(now_ms)
        elif self.standing is not Standing.FOLLOWER and now_ms >= self._resend_ms:
            self._send_ballot(now_ms)

    @property
    def _in_doubt(self) -> bool:
        """Whether the ledger can be reached is worth asking."""
        stalled = self._kafka_stalled_ms is not None or self._leader_stalled
        return stalled or self._reach.doubtful

    def _mind_reach(self, now_ms: int) -> None:
        """Hands over where this leader alone is cut off from Kafka."""
        to = self._reach.successor(self._order, self._majority, now_ms)
        stalled = self._kafka_stalled_ms is not None
        if to and stalled and now_ms - self._led_since_ms >= HOLD_MS:
            self._step_down("it alone cannot reach Kafka", now_ms, to)

    @property
    def _may_stand(self) -> bool:
        """Not while it would lead cold, and not with a state that differs from a leader's."""
        return self._caught_up and not self._barred and self.is_member

    def _draw(self) -> float:
        self._draws += 1
        return _fraction(self._seed, self._draws)

    def _patience_end(self, now_ms: int) -> int:
        """When to stand unless a leader is heard: in [1, 2) timeouts, higher ranks earlier."""
        slot = (self._rank + self._draw()) / (len(self._order) or 1)
        cut_off = self._reach.own(now_ms) is False  # others can do more with the role
        return now_ms + self.timeout_ms + int(self.timeout_ms * (slot + cut_off))

    @property
    def _rank(self) -> int:
        return self._order.index(self.me) if self.is_member else len(self._order)

    def _hurry(self, now_ms: int, gone: str, first: str = "") -> None:
        """The leader is gone or going: all stand a step after each other, long after `first`."""
        order = [name for name in self._order if name != gone]
        order.sort(key=lambda name: name != first)
        cut_off = self._reach.own(now_ms) is False
        rank = order.index(self.me) if self.me in order and not cut_off else len(order)
        head_start = first in order and first != self.me
        wait_ms = rank * self.timing.stagger_ms + head_start * self.timing.successor_head_start_ms
        self._stand_at_ms = min(self._stand_at_ms, now_ms + wait_ms)
        self._promised_until_ms = now_ms
        for ballot in list(self._refused.values()):
            self._ballot(ballot, now_ms)  # what stood against it has just gone

    # --- standing for the role ----------------------------------------------------------------

    def _stand(self, now_ms: int) -> None:
        """Asks first whether a vote would succeed: a term is not spent on a hopeless election."""
        if not self._ended:
            silent = self.leader or self._ledger_leader  # one that just started heard nobody yet
            self._ended = f"{silent} was not heard" if silent else "nobody was heard"
        self.standing = Standing.PRE_CANDIDATE
        self._standing_for = self.term + 1
        self._postponed = False
        self._begin_round(now_ms)

    def _begin_round(self, now_ms: int) -> None:
        self._round += 1
        self._granted = {self.me}
        half = self.timeout_ms // 2
        self._stand_at_ms = now_ms + half + int(half * self._draw()) + 1
        if not self._advance(now_ms):
            self._send_ballot(now_ms)

    def _send_ballot(self, now_ms: int) -> None:
        """Same ballot again at every heartbeat: messages get lost, and voters change their mind."""
        self._resend_ms = now_ms + self.timing.heartbeat_ms
        kind: BallotKind = "pre_vote" if self.standing is Standing.PRE_CANDIDATE else "vote"
        self._out.append(SendBallot(ballot=self._my_ballot(kind, self._round)))

    def _my_ballot(self, kind: BallotKind, number: int) -> Ballot:
        return Ballot(
            kind=kind, role=self.role, term=self._standing_for, candidate=self.me,
            incarnation=self.incarnation, round=number, members_version=self._members_version,
        )  # fmt: skip

    def _advance(self, now_ms: int) -> bool:
        """With a majority: from pre-candidate to candidate, from candidate to leader."""
        if len(self._granted) < self._majority:
            return False
        if self.standing is Standing.PRE_CANDIDATE:
            if self._standing_for <= self.term:
                self._stand(now_ms)  # the term was used up meanwhile
                return True
            self.standing = Standing.CANDIDATE
            self.term = self._standing_for
            self._voted = (self.term, self.me, self.incarnation)
            self._begin_round(now_ms)
        else:
            self._become_leader(now_ms)
        return True

    def _become_leader(self, now_ms: int) -> None:
        self.standing = Standing.LEADER
        self.leader, self.leader_incarnation = self.me, self.incarnation
        self._lease_until_ms, self._renewed_ms = now_ms + self.timeout_ms, now_ms
        self._renewals.clear()
        self._renewed_by.clear()
        self._voters = Voters()
        self._reach.lead()
        self._led_since_ms, self._leader_stalled, self._gone_ms = now_ms, False, None
        self._refused.clear()
        self._out.append(TakeRole(term=self._standing_for, why=self._ended))
        self._ended = ""
        self._heartbeat(now_ms)

    # --- leading ------------------------------------------------------------------------------

    def _heartbeat(self, now_ms: int) -> None:
        self._resend_ms = now_ms + self.timing.heartbeat_ms
        self._out.append(SendBeacon(beacon=self._my_beacon(stepping_down=False)))
        self._show_voters(now_ms)
        if self._majority == 1:
            return
        self._round += 1
        self._renewals[self._round] = (now_ms, {self.me})
        expired = now_ms - self.timeout_ms
        for number in [n for n, (sent, _) in self._renewals.items() if sent <= expired]:
            del self._renewals[number]
        self._out.append(SendBallot(ballot=self._my_ballot("renew", self._round)))

    def _show_voters(self, now_ms: int) -> None:
        """Tells the core who answers: it changes the membership only while enough do."""
        since = now_ms - self.timeout_ms
        heard, knowing = [self.me], [self.me]
        for name in self._order:
            at_ms, version = self._renewed_by.get(name, (since, 0))
            if at_ms > since:
                heard.append(name)
                if version >= self._members_version:
                    knowing.append(name)
        voters = Voters(tuple(sorted(heard)), tuple(sorted(knowing)))
        if len(heard) >= self._majority and voters != self._voters:
            self._voters = voters
            self._out.append(ShowVoters(voters=voters))

    def _my_beacon(self, *, stepping_down: bool, reason: str = "", to: str = "") -> Beacon:
        return Beacon(
            role=self.role, term=self._standing_for, leader=self.me,
            incarnation=self.incarnation, lease_ms=self.timeout_ms,
            ledger_offset=self._ledger_offset, stepping_down=stepping_down,
            kafka="ok" if self._kafka_stalled_ms is None else "stalled",
            kafka_stalled_since_ms=self._kafka_stalled_ms or 0, state_digest=self._digest,
            reason=reason, successor=to,
        )  # fmt: skip

    def _step_down(self, reason: str, now_ms: int, to: str = "") -> None:
        """Says so, so that others stand at once, and stands last itself."""
        beacon = self._my_beacon(stepping_down=True, reason=reason, to=to)
        self._out.append(SendBeacon(beacon=beacon))
        self._follow(now_ms)
        self._ended = f"{self.me} stepped down: {reason}"
        self._out.append(LoseRole(reason=reason))
        self._stand_at_ms += self.timeout_ms

    def _follow(self, now_ms: int) -> None:
        """Back to follower; whoever called says why, and LoseRole if this was the leader."""
        self.standing = Standing.FOLLOWER
        self.leader, self.leader_incarnation, self._leader_stalled = "", 0, False
        self._promised_until_ms, self._gone_ms = now_ms, None
        self._stand_at_ms = self._patience_end(now_ms)

    def _see_term(self, term: int, now_ms: int, why: str) -> None:
        """A higher term exists: adopt it; a leader or candidate of an older one follows."""
        if term <= self.term:
            return
        was = self.standing
        self.term = term
        if was is Standing.LEADER:
            self._follow(now_ms)
            self._out.append(LoseRole(reason=f"{why} is at term {term}"))
        elif was is Standing.CANDIDATE:
            self._follow(now_ms)

    # --- voting -------------------------------------------------------------------------------

    def _ballot(self, ballot: Ballot, now_ms: int) -> None:
        if ballot.role != self.role or ballot.candidate == self.me:
            return
        if ballot.candidate not in self._order or not self.is_member:
            return
        if ballot.kind == "renew":
            refusal = self._renew(ballot, now_ms)
        else:
            refusal = self._why_refuse(ballot, now_ms)
            self._remember_refused(ballot, refusal)
            if not refusal:
                self._grant(ballot, now_ms)
        self._out.append(
            SendBallotReply(
                reply=BallotReply(
                    kind=ballot.kind, role=self.role, term=ballot.term,
                    candidate=ballot.candidate, candidate_incarnation=ballot.incarnation,
                    voter=self.me, round=ballot.round, granted=not refusal,
                    voter_term=self.term, reason=refusal,
                    members_version=self._members_version,
                    reaches_ledger=self._reach.own(now_ms),
                )
            )
        )  # fmt: skip

    def _remember_refused(self, ballot: Ballot, refusal: str) -> None:
        """A pre-vote refused for the leader's sake is looked at again when the leader goes."""
        if refusal and ballot.kind == "pre_vote":
            self._refused[ballot.candidate] = ballot
        else:
            self._refused.pop(ballot.candidate, None)

    def _why_refuse(self, ballot: Ballot, now_ms: int) -> str:
        if self.standing is Standing.LEADER:
            return f"{self.me} leads"  # its lease is valid, else it would have stepped down
        if now_ms < self._promised_until_ms:
            return f"{self.leader} leads" if self.leader else "restarted, waiting a lease out"
        if ballot.term < self.term:
            return f"term {ballot.term} is older than {self.term}"
        if ballot.members_version < self._members_version:
            return f"it has not read membership {self._members_version} yet"
        if ballot.term <= self._ledger_term:
            return f"term {ballot.term} was started in the ledger"
        if ballot.term == self.term:
            if ballot.kind == "pre_vote":
                return f"term {ballot.term} was used"
            mine = (ballot.term, ballot.candidate, ballot.incarnation)
            if self._voted is not None and self._voted[0] == ballot.term and self._voted != mine:
                return f"voted for {self._voted[1]} in term {ballot.term}"
        return ""

    def _grant(self, ballot: Ballot, now_ms: int) -> None:
        if ballot.kind == "vote":
            self._see_term(ballot.term, now_ms, ballot.candidate)
            self._voted = (ballot.term, ballot.candidate, ballot.incarnation)
            if self.standing is not Standing.FOLLOWER:
                self._follow(now_ms)
            self._stand_at_ms = self._patience_end(now_ms)
        elif not self._postponed:
            # Once per own attempt: a candidate that never wins must not keep others from standing.
            self._postponed = True
            before = self._order.index(ballot.candidate) < self._order.index(self.me)
            if self.standing is Standing.PRE_CANDIDATE and before:
                self.standing = Standing.FOLLOWER  # both ask: the lower rank gives way
            later = now_ms + self.timing.timeout_ms // 2
            self._stand_at_ms = max(self._stand_at_ms, later)

    def _renew(self, ballot: Ballot, now_ms: int) -> str:
        """A leader asks for its lease again. "" where granted."""
        if ballot.term < self.term:
            return f"term {ballot.term} is older than {self.term}"
        self._hear_leader(
            ballot.term, ballot.candidate, ballot.incarnation, self.timeout_ms, now_ms
        )
        if self.leader != ballot.candidate:
            return f"{self.leader or self.me} leads term {self.term}"
        return ""

    # --- what others say ----------------------------------------------------------------------

    def _reply(self, reply: BallotReply, now_ms: int) -> None:
        mine = (reply.candidate, reply.candidate_incarnation) == (self.me, self.incarnation)
        if not mine or reply.role != self.role or reply.voter not in self._order:
            return
        if reply.kind == "renew":
            self._renewed(reply, now_ms)
            return
        expected = "pre_vote" if self.standing is Standing.PRE_CANDIDATE else "vote"
        standing = self.standing in (Standing.PRE_CANDIDATE, Standing.CANDIDATE)
        if not standing or reply.kind != expected or reply.round != self._round:
            return
        if reply.granted:
            self._granted.add(reply.voter)
            self._advance(now_ms)
        elif reply.voter_term >= self._standing_for and reply.voter_term > self.term:
            self._see_term(reply.voter_term, now_ms, reply.voter)
            if self.standing is Standing.PRE_CANDIDATE:
                self._stand(now_ms)  # ask again, for a term that is new to this voter

    def _renewed(self, reply: BallotReply, now_ms: int) -> None:
        if self.standing is not Standing.LEADER or reply.term != self._standing_for:
            return
        if not reply.granted:
            self._see_term(reply.voter_term, now_ms, reply.voter)
            return
        self._renewed_by[reply.voter] = (now_ms, reply.members_version)
        self._reach.said(reply.voter, reply.reaches_ledger, now_ms)
        renewal = self._renewals.get(reply.round)
        if renewal is None:
            return
        sent_ms, voters = renewal
        voters.add(reply.voter)
        if len(voters.intersection(self._order)) >= self._majority and sent_ms > self._renewed_ms:
            self._silence.heard(now_ms, since_ms=self._renewed_ms)
            self._renewed_ms = sent_ms
            self._lease_until_ms = max(self._lease_until_ms, sent_ms + self.timeout_ms)

    def _beacon(self, beacon: Beacon, now_ms: int) -> None:
        if beacon.role != self.role or beacon.leader == self.me:
            return
        if beacon.term < self.term:
            return
        if beacon.leader not in self._order and not (
            beacon.stepping_down and beacon.leader == self.leader  # removed, it says goodbye
        ):
            return
        if beacon.stepping_down:
            known = (self.leader, self.leader_incarnation)
            if self.standing is Standing.LEADER or (
                self.leader and known != (beacon.leader, beacon.incarnation)
            ):
                return
            self._see_term(beacon.term, now_ms, beacon.leader)
            self.leader, self.leader_incarnation, self._leader_stalled = "", 0, False
            self._ended = f"{beacon.leader} stepped down: {beacon.reason}".removesuffix(": ")
            self._hurry(now_ms, beacon.leader, beacon.successor)
            return
        lease_ms = min(beacon.lease_ms, STRETCH_MAX * self.timing.timeout_ms)
        self._hear_leader(beacon.term, beacon.leader, beacon.incarnation, lease_ms, now_ms)
        if self.leader == beacon.leader:
            self._leader_stalled = beacon.kafka == "stalled"

    def _hear_leader(
        self, term: int, leader: str, incarnation: int, lease_ms: int, now_ms: int
    ) -> None:
        """A leader of our term or a newer one lives: follow it and keep peace for its lease."""
        same = (self.leader, self.leader_incarnation) == (leader, incarnation)
        if same and self._gone_ms is not None:
            if now_ms <= self._gone_ms + self.timing.heartbeat_ms:
                return  # said before the hint, arrived after it
            self._gone_ms = None
        self._see_term(term, now_ms, leader)
        if self.standing is Standing.LEADER:
            return  # two of one term: the ledger takes one of them, the other will resign
        if self.leader and not same and now_ms < self._promised_until_ms and term == self.term:
            return
        self.standing = Standing.FOLLOWER
        self.leader, self.leader_incarnation = leader, incarnation
        self._gone_ms, self._ended = None, ""
        self._refused.clear()
        self._silence.heard(now_ms, since_ms=self._heard_ms if same and self._caught_up else now_ms)
        self._heard_ms = now_ms
        lease_ms = max(lease_ms, self.timeout_ms)
        self._promised_until_ms = max(self._promised_until_ms, now_ms + lease_ms)
        self._stand_at_ms = self._patience_end(now_ms)

    def _peer_gone(self, peer: str, now_ms: int) -> None:
        if peer != self.leader or self.standing is Standing.LEADER:
            return
        self._gone_ms, self._ended = now_ms, f"the process of {peer} is gone"
        self._hurry(now_ms, peer)

    def _ledger_advanced(self, event: LedgerAdvanced, now_ms: int) -> None:
        self._ledger_offset, self._digest = event.next_offset, event.digest
        self._ledger_leader = event.leader
        self._ledger_term = max(self._ledger_term, event.term)
        self._caught_up = self._caught_up or event.caught_up
        self._see_term(event.term, now_ms, "the ledger")
