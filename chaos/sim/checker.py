"""Judges every step: a faithful reader of the ledger, and a dumb second bookkeeping beside it.

The second bookkeeping knows the rules of DESIGN and none of the code that it judges: a fold that
forgets a check does not hide the bug from it. Numbers in comments are DESIGN's invariants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from chaos.sim.world import Violation, World
from controlplane.core.bounds import RECORDS_PER_READ_MAX
from controlplane.core.coordinator import Role
from dataplane.core.jobs import PLACED, TRANSITIONS, Cause, Phase
from dataplane.core.snapshot import image_of
from dataplane.core.state import PoolState
from idl import ledger
from idl.codec import decode_entry
from idl.control import AssignIntent, Intent
from idl.errors import InvariantBrokenError
from idl.jobs import JobSpec, SourceRef
from idl.ledger import LedgerEntry
from idl.limits import INBOX_RECORDS_MAX
from idl.records import AttemptResult

if TYPE_CHECKING:
    from chaos.sim.agent import Node, SimAgent
    from chaos.sim.process import SimCoordinator

HASH_EVERY = 8
"""Full state hashes are compared at every n-th offset and at the end of the log."""
IMAGE_EVERY = 20
"""A snapshot is taken at every n-th offset where an entry is valid."""
WITHOUT_RESULT = ("node_lost", "platform")
"""Outcomes with which an attempt may be released without a result record."""
ENDS = (ledger.Finished, ledger.DeadLettered, ledger.Cancelled)
Key = tuple[str, int]


@dataclass
class Known:
    """One job in the second bookkeeping."""

    phase: Phase = Phase.PENDING
    attempt: int = 0
    node: str = ""
    incarnation: int = 0
    since_ms: int = 0
    succeeded: bool = False


@dataclass
class Checker:
    """`landed` for every record of the ledger; the others as processes and nodes act."""

    world: World
    state: PoolState = field(default_factory=PoolState)
    jobs: dict[str, Known] = field(default_factory=dict)
    terms: dict[int, tuple[str, int]] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    assigned: dict[Key, tuple[str, int]] = field(default_factory=dict)
    """Every attempt that was ever validly assigned → its node and incarnation."""
    held: dict[str, dict[Key, int]] = field(default_factory=dict)
    """Node → attempts that its kernel really holds → incarnation."""
    taken: dict[Key, str] = field(default_factory=dict)
    running: dict[str, dict[int, str]] = field(default_factory=dict)
    """Exclusive job → attempts whose program really runs → node."""
    specs: dict[str, JobSpec] = field(default_factory=dict)
    results: dict[SourceRef, AttemptResult] = field(default_factory=dict)
    dead_letters: dict[str, int] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    """Snapshots, the newest two."""
    refused: int = 0
    members: set[str] = field(default_factory=set)
    """By the ledger; empty before its first change."""

    # --- the ledger grows ---------------------------------------------------------------------

    def landed(self, offset: int, value: bytes) -> None:
        """The most faithful reader of all."""
        entry = decode_entry(offset, value)
        verdict = self.state.apply(offset, entry)
        if not verdict.valid:
            self.world.count("void", verdict.reason)
            self.world.note(
                f"ledger {offset}: {entry.term}.{entry.seq} by {entry.leader} VOID, "
                f"{verdict.detail}", f"t{entry.term}", entry.leader,
            )  # fmt: skip
            return
        self._owner(entry)
        for decision in entry.decisions:
            self._tell(offset, entry, decision)
            self._decided(entry, decision)
        self.state.check_invariants()  # 5
        self._same_as_second()
        if offset % IMAGE_EVERY == 0:
            self.images = [*self.images[-1:], msgspec.msgpack.encode(image_of(self.state))]
        if offset % HASH_EVERY == 0:
            self.hashes[offset] = self.state.state_hash()

    def _owner(self, entry: LedgerEntry) -> None:
        """1: one valid leader per term, terms grow."""
        mine = (entry.leader, entry.incarnation)
        if isinstance(entry.decisions[0], ledger.TermStarted):
            if entry.term in self.terms:
                raise Violation(
                    "one-leader-per-term", f"term {entry.term} was started by "
                    f"{self.terms[entry.term]} and by {mine}", f"t{entry.term}", entry.leader,
                )  # fmt: skip
            if entry.term <= max(self.terms, default=0):
                raise Violation("terms-grow", f"term {entry.term} after {max(self.terms)}")
            self.terms[entry.term] = mine
        elif self.terms.get(entry.term) != mine or entry.term != max(self.terms):
            raise Violation(
                "one-leader-per-term", f"a valid entry of term {entry.term} by {mine}, which "
                f"{self.terms.get(entry.term)} started", f"t{entry.term}", entry.leader,
            )  # fmt: skip

    def _tell(self, offset: int, entry: LedgerEntry, decision: ledger.Decision) -> None:
        kind = type(decision).__name__
        self.world.count("decision", kind)
        job = getattr(decision, "job", "")
        name = job if isinstance(job, str) else job.id
        more = f" {name}" if name else f" {getattr(decision, 'node', '')}"
        for word in ("attempt", "node", "outcome", "code"):
            if hasattr(decision, word) and (name or word != "node"):
                more += f" {word}={getattr(decision, word)}"
        self.world.note(
            f"ledger {offset}: {entry.term}.{entry.seq} by {entry.leader}: {kind}{more}",
            *([name] if name else []), *([f"t{entry.term}"] if kind == "TermStarted" else []),
        )  # fmt: skip

    def _decided(self, entry: LedgerEntry, decision: ledger.Decision) -> None:
        match decision:
            case ledger.Ingested(job=spec):
                if spec.id in self.jobs:
                    raise Violation("ends-once", f"{spec.id} was ingested twice", spec.id)
                self.jobs[spec.id], self.specs[spec.id] = Known(), spec
            case ledger.Rejected():
                self.refused += 1
            case ledger.MembersChanged(members=members):
                after: set[str] = {member.name for member in members}
                if len(after ^ (self.members or after)) > 1 or not after:
                    raise Violation("one-member-at-a-time", f"{self.members} became {after}")
                self.members = after
            case ledger.Assigned(job=job):
                self._assigned(self._move(job, decision), decision)
            case ledger.Released(job=job):
                self._released(self._move(job, decision), decision)
            case ledger.Started(job=job) | ledger.RetryScheduled(job=job):
                self._move(job, decision)
            case ledger.Finished(job=job):
                if not self._move(job, decision).succeeded:
                    raise Violation("one-result", f"{job} finished without a success", job)
                self.ends[job] = "Finished"
            case ledger.DeadLettered(job=job) | ledger.Cancelled(job=job):
                self._move(job, decision)
                self.ends[job] = type(decision).__name__
            case _:
                pass

    def _move(self, job: str, decision: ledger.Decision) -> Known:
        """2: a job that ended never moves again; and every move is one of the table."""
        known = self.jobs.get(job)
        cause = Cause(type(decision).__name__)
        if known is None:
            raise Violation("ends-once", f"{cause} about {job}, which nobody submitted", job)
        target = TRANSITIONS.get((known.phase, cause))
        if target is None:
            raise Violation("ends-once", f"{cause} about {job}, which is {known.phase}", job)
        self.world.count("transition", f"{known.phase}→{cause}")
        known.phase, known.since_ms = target, self.world.now
        return known

    def _assigned(self, known: Known, decision: ledger.Assigned) -> None:
        """4: attempts are numbered, and none is given out while another is valid."""
        key = (decision.job, decision.attempt)
        if decision.attempt != known.attempt + 1 or key in self.assigned:
            raise Violation(
                "fencing-number", f"attempt {decision.attempt} of {decision.job} follows "
                f"{known.attempt}", decision.job,
            )  # fmt: skip
        known.attempt, known.node = decision.attempt, decision.node
        known.incarnation = decision.incarnation
        self.assigned[key] = (decision.node, decision.incarnation)
        self._fits_beside(decision)

    def _fits_beside(self, decision: ledger.Assigned) -> None:
        """5: also beside what the node really runs still though the ledger gave it up."""
        really = self.held.get(decision.node, {})
        there = {key for key, incarnation in really.items() if incarnation == decision.incarnation}
        placed = self.state.nodes[decision.node].attempts.items()
        there |= {(job, reservation.attempt) for job, reservation in placed}
        cpu = sum(self.specs[job].resources.cpu_millis for job, _ in there)
        if cpu > self.state.nodes[decision.node].capacity.cpu_millis:
            raise Violation(
                "over-commit", f"{decision.node} gets {decision.job}/{decision.attempt} and would "
                f"hold {cpu}m CPU: {sorted(there)}", decision.job, decision.node,
            )  # fmt: skip

    def _released(self, known: Known, decision: ledger.Released) -> None:
        """3 and 5: only by the current attempt's result, or where there can be none."""
        job, key = decision.job, (decision.job, decision.attempt)
        if decision.attempt != known.attempt:
            raise Violation("one-result", f"{job}/{decision.attempt} is not current", job)
        if decision.source is not None:
            found = self.results.get(decision.source)
            if found is None or (found.job, found.attempt, found.node) != (*key, known.node):
                raise Violation(
                    "one-result", f"{job}/{decision.attempt} on {known.node} was ended by the "
                    f"result of {found.job}/{found.attempt} on {found.node}" if found else
                    f"{job}/{decision.attempt} was ended by no result at all", job,
                )  # fmt: skip
        else:
            self._without_result(known, decision, key)
        if decision.outcome == "succeeded":
            if known.succeeded:
                raise Violation("one-result", f"{job} has two accepted results", job)
            known.succeeded = True
        known.node = ""

    def _without_result(self, known: Known, decision: ledger.Released, key: Key) -> None:
        """5: the node is lost or restarted without it; else it must not hold the attempt."""
        if decision.outcome not in WITHOUT_RESULT:
            raise Violation("confirmed-end", f"{key} ended as {decision.outcome} unseen", key[0])
        node = self.state.nodes.get(known.node)
        lost = node is None or node.lost or node.incarnation != known.incarnation
        held = self.held.get(known.node, {}).get(key)
        if not lost and held == known.incarnation:
            raise Violation(
                "confirmed-end", f"room of {key[0]}/{key[1]} was given back while "
                f"{known.node} holds it", key[0],
            )  # fmt: skip

    def _same_as_second(self) -> None:
        """The fold and the second bookkeeping agree on who is where."""
        for name, job in self.state.jobs.items():
            known = self.jobs[name]
            if (job.phase, job.attempt, job.node) != (known.phase, known.attempt, known.node):
                raise Violation("replay", f"{name} is {job.phase} on {job.node!r}: {known}", name)

    # --- processes act ------------------------------------------------------------------------

    def compare(self, name: str, state: PoolState, offset: int) -> None:
        """7: every reader that applied the same prefix holds the same state."""
        if (state.term, state.gate.seq) != (self.state.term, self.state.gate.seq) and (
            offset == self.state.next_offset - 1
        ):
            raise Violation(
                "replay",
                f"{name} is at {state.term}.{state.gate.seq} after offset {offset}, others at "
                f"{self.state.term}.{self.state.gate.seq}",
                name,
            )
        if offset in self.hashes and state.state_hash() != self.hashes[offset]:
            raise Violation("replay", f"{name} differs at ledger offset {offset}", name)

    def appending(self, process: SimCoordinator, entry: LedgerEntry) -> None:
        """One entry in flight: the next only after the last was read back valid (ADR 0005)."""
        gate = process.core.state.gate
        mine = (gate.leader, gate.incarnation) == (process.name, process.incarnation)
        follows = gate.seq + 1 if mine and gate.term == entry.term else 1
        if entry.seq != follows:
            raise Violation(
                "one-in-flight",
                f"{process.name} appends {entry.term}.{entry.seq}, read back up to {follows - 1}",
                process.name,
                f"t{entry.term}",
            )

    def sending(self, process: SimCoordinator, intent: Intent) -> None:
        """A leader orders what the ledger says, and nothing before the ledger says it."""
        for item in intent.items:
            if not isinstance(item, AssignIntent):
                continue
            place = self.assigned.get((item.job, item.attempt))
            if place != (intent.node, intent.node_incarnation):
                raise Violation(
                    "read-back-first", f"{process.name} tells {intent.node} to run {item.job}/"
                    f"{item.attempt}, which the ledger gave to {place}", item.job, process.name,
                )  # fmt: skip

    def after_step(self, process: SimCoordinator) -> None:
        """Whoever leads by its own books leads by the ledger that it has read; 9: bounds."""
        core = process.core
        if core.role is Role.LEADING:
            gate = core.state.gate
            if (gate.term, gate.leader, gate.incarnation) != (
                core.term, process.name, process.incarnation,
            ):  # fmt: skip
                raise Violation("deposed-resigns", f"{process.name} leads term {core.term} having "
                                f"read of {gate.leader}'s term {gate.term}", process.name,
                                f"t{core.term}")  # fmt: skip
        inbox = core._inbox
        waiting = max(
            len(inbox.results), len(inbox.commands), *map(len, inbox.submissions.values())
        )
        if waiting > INBOX_RECORDS_MAX + RECORDS_PER_READ_MAX:
            raise Violation("memory", f"{process.name} holds {waiting} undecided records")
        policies = process.cluster.policies
        for queue, policy in policies.items():
            counters = core.state.queues.get(queue)
            if counters and counters.live > policy.live_jobs_max:
                raise Violation("memory", f"{queue} has {counters.live} live jobs")

    def attempt_taken(self, agent: SimAgent, assign: AssignIntent) -> None:
        """An agent begins an attempt: it was given to it, and never begun before (4)."""
        key = (assign.job, assign.attempt)
        if self.assigned.get(key) != (agent.name, agent.incarnation):
            raise Violation("read-back-first", f"{agent.name} runs {key}, which the ledger gave "
                            f"to {self.assigned.get(key)}", key[0], agent.name)  # fmt: skip
        if key in self.taken:
            raise Violation("runs-once", f"{agent.name} runs {key[0]}/{key[1]}, which "
                            f"{self.taken[key]} ran before", key[0], agent.name)  # fmt: skip
        known = self.jobs[key[0]]
        current = (known.node, known.attempt) == (agent.name, key[1]) and known.phase in PLACED
        self.world.count("attempt", "taken" if current else "taken_after_it_was_given_up")
        beside = [other for held in self.held.values() for other in held if other[0] == key[0]]
        if beside:  # 4: of several that run, the ledger calls one valid; the others were given up
            self.world.count("attempt", "beside_one_given_up")
        self.taken[key] = agent.name
        self.held.setdefault(agent.name, {})[key] = agent.incarnation
        self._fits(agent)

    def _fits(self, agent: SimAgent) -> None:
        """5: what a kernel holds is never more than the node has."""
        held = [agent.node.jobs[k].assign for k in self.held[agent.name] if k in agent.node.jobs]
        cpu = sum(a.spec.resources.cpu_millis for a in held)
        gpus = [gpu for a in held for gpu in a.gpus]
        if cpu > agent.core.capacity.cpu_millis or len(gpus) != len(set(gpus)):
            raise Violation("over-commit", f"{agent.name} holds {cpu}m CPU, GPUs {gpus}")

    def attempt_begins(self, node: Node, key: Key, spec: JobSpec) -> None:
        """4: programs of an exclusive job never overlap in real time."""
        if not spec.exclusive:
            return
        self.world.count("attempt", "exclusive")
        beside = self.running.setdefault(key[0], {})
        if beside:
            raise Violation("exclusive", f"{node.name} runs {key[0]}/{key[1]} while attempt "
                            f"{beside} runs", key[0], node.name)  # fmt: skip
        beside[key[1]] = node.name

    def attempt_gone(self, node: Node, key: Key) -> None:
        """Nothing of the attempt is left on the node."""
        self.held.get(node.name, {}).pop(key, None)
        self.running.get(key[0], {}).pop(key[1], None)

    # --- the end ------------------------------------------------------------------------------

    def replay(self, records: list[bytes]) -> None:
        """7: the ledger alone gives the state again."""
        fresh = PoolState()
        try:
            for offset, value in enumerate(records):
                fresh.apply(offset, decode_entry(offset, value))
        except InvariantBrokenError as error:
            raise Violation("replay", str(error)) from error
        if fresh.state_hash() != self.state.state_hash():
            raise Violation("replay", "the ledger alone gives another state")
