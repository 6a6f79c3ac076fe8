"""Bugs put in on purpose, to see that the simulator finds them. Never part of the product.

Each changes the real cores from outside, for the time of one life. `seed` is one that finds it (the
test runs just that); None where another defence makes the bug harmless, which `why` explains.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from controlplane.core import coordinator, cycle, election, leases
from controlplane.core import events as e
from dataplane.core.jobs import PLACED
from dataplane.core.nodes import Node
from dataplane.core.state import PoolState
from dataplane.core.validity import VALID, TermGate, Verdict
from idl import ledger
from idl.control import AssignIntent, Intent, Lease
from idl.ledger import Assigned, LedgerEntry, TermStarted
from idl.records import CancelJob
from node_agent.core.attempts import AgentCore

if TYPE_CHECKING:
    from chaos.sim.agent import SimAgent
    from chaos.sim.process import SimCoordinator


class Plant:
    """One bug: patches for the time of a life, or a change of one process as it starts."""

    what = ""
    seed: int | None = None
    why = ""

    def patches(self) -> list[tuple[Any, str, Any]]:
        """(object, attribute, value while planted)."""
        return []

    def on_coordinator(self, process: "SimCoordinator") -> None:
        """A coordinator starts."""

    def on_agent(self, agent: "SimAgent") -> None:
        """An agent starts."""

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Puts the bug in and takes it out."""
        with contextlib.ExitStack() as undo:
            for target, name, value in self.patches():
                undo.callback(setattr, target, name, getattr(target, name))
                setattr(target, name, value)
            yield


class ActBeforeReadBack(Plant):
    """Sends the intents of a batch when it is appended, not when it was read back."""

    what = "a leader acts on a decision before it has read it back"
    seed = 0

    def on_coordinator(self, process: "SimCoordinator") -> None:
        core, step = process.core, process.core.step

        def hasty(event: e.CoordinatorEvent, now_ms: int) -> tuple[e.CoordinatorEffect, ...]:
            effects = step(event, now_ms)
            early = [
                e.SendIntent(intent=_early(core, effect.entry, decision))
                for effect in effects
                if isinstance(effect, e.Append)
                for decision in effect.entry.decisions
                if isinstance(decision, Assigned)
            ]
            return (*effects, *early)

        _replace(core, "step", hasty)


def _early(core: coordinator.Coordinator, entry: LedgerEntry, decision: Assigned) -> Intent:
    job = core.state.jobs[decision.job]
    assign = AssignIntent(
        job=job.id, attempt=decision.attempt, queue=job.queue, spec=job.spec, gpus=decision.gpus
    )
    return Intent(
        pool=core.pool, node=decision.node, node_incarnation=decision.incarnation,
        term=entry.term, leader=entry.leader, items=(assign,),
    )  # fmt: skip


class ReaderIgnoresTerm(Plant):
    """c1 counts what a former leader writes late."""

    what = "one reader of the ledger ignores the term"
    seed = 4

    def on_coordinator(self, process: "SimCoordinator") -> None:
        if process.name == "c1":
            process.core.state.gate = _Gullible()


class _Gullible(TermGate):
    __slots__ = ()

    def _verdict(self, entry: LedgerEntry) -> Verdict:
        verdict = super()._verdict(entry)
        return VALID if verdict.reason in ("older_term", "not_the_leader") else verdict


class LateResultAccepted(Plant):
    """The attempt number of a result is not looked at."""

    what = "a late attempt's result is accepted for the current attempt"
    seed = 22

    def patches(self) -> list[tuple[Any, str, Any]]:
        def lenient(state: PoolState, result: Any) -> str:
            job = state.jobs.get(result.job)
            return "" if job is not None and job.phase in PLACED else "no attempt is out"

        return [(cycle, "why_refused", lenient)]


class IntentForgottenAtTakeover(Plant):
    """A new leader does not rebuild the book of intents from the ledger."""

    what = "an assignment that was not sent yet is forgotten at takeover"
    seed = 4

    def patches(self) -> list[tuple[Any, str, Any]]:
        become = coordinator.Coordinator._become_leader

        def forgetful(self: coordinator.Coordinator, now_ms: int) -> None:
            become(self, now_ms)
            self._book.clear()
            self._book.leases.lead(self.state, now_ms)

        return [(coordinator.Coordinator, "_become_leader", forgetful)]


class ReleasedBeforeConfirmed(Plant):
    """A cancelled job's room is given back when the operator says so, not when its end is known."""

    what = "resources are released before the end of the attempt is confirmed"
    seed = 0

    def patches(self) -> list[tuple[Any, str, Any]]:
        cancel = cycle.Cycle._cancel

        def hasty(self: cycle.Cycle, read: e.CommandRead, command: CancelJob, by: str) -> bool:
            job = self.state.jobs.get(command.job)
            free = job is not None and job.id not in self.batch.touched
            if not cancel(self, read, command, by):
                return False
            if job is not None and free and job.phase in PLACED:
                self.batch.add(
                    ledger.Released(job=job.id, attempt=job.attempt, outcome="platform"),
                    ledger.Cancelled(job=job.id, by=by),
                )
            return True

        return [(cycle.Cycle, "_cancel", hasty)]


class DuplicateAppendCounted(Plant):
    """No reader looks at `seq`."""

    what = "a record that the producer repeated counts twice"
    seed = 5

    def patches(self) -> list[tuple[Any, str, Any]]:
        judge = TermGate._verdict

        def lenient(self: TermGate, entry: LedgerEntry) -> Verdict:
            verdict = judge(self, entry)
            again = verdict.reason == "duplicate" and type(entry.decisions[0]) is not TermStarted
            return VALID if again else verdict

        return [(TermGate, "_verdict", lenient)]


class VotesTwice(Plant):
    """A voter says yes to everybody, always."""

    what = "a voter votes twice in a term"
    why = "both winners append TermStarted: the ledger's order takes one, the other resigns"

    def patches(self) -> list[tuple[Any, str, Any]]:
        def yes(self: election.Election, ballot: Any, now_ms: int) -> str:
            return ""

        return [(election.Election, "_why_refuse", yes)]


class VotesTwiceAndTermsShared(VotesTwice):
    """The same, and the ledger's rule does not ask who started a term."""

    what = "a voter votes twice in a term, and a term may be started twice"
    why = ""
    seed = 6

    def patches(self) -> list[tuple[Any, str, Any]]:
        judge = TermGate._verdict

        def lenient(self: TermGate, entry: LedgerEntry) -> Verdict:
            verdict = judge(self, entry)
            return VALID if verdict.reason == "not_the_leader" and entry.seq == 1 else verdict

        return [*super().patches(), (TermGate, "_verdict", lenient)]


class NoResignOnVoid(Plant):
    """A leader that reads of its successor goes on."""

    what = "a leader does not resign when it reads that its term is over"
    seed = 2

    def patches(self) -> list[tuple[Any, str, Any]]:
        def stays(self: coordinator.Coordinator, reason: str, to: str = "") -> None:
            self._flight = None

        return [(coordinator.Coordinator, "_resign", stays)]


class AssignsToLostNode(Plant):
    """The scheduler does not look whether a node is lost."""

    what = "an attempt is assigned to a node that was declared lost"
    seed = 6

    def patches(self) -> list[tuple[Any, str, Any]]:
        return [(Node, "schedulable", property(lambda node: not node.draining))]


class AgentIgnoresTerm(Plant):
    """An agent obeys whoever speaks to its incarnation."""

    what = "an agent does not refuse intents of an older term"
    seed = 66

    def patches(self) -> list[tuple[Any, str, Any]]:
        refuse = AgentCore._refusal

        def lenient(self: AgentCore, intent: Intent) -> str:
            reason = refuse(self, intent)
            return "" if reason == "older-term" else reason

        return [(AgentCore, "_refusal", lenient)]


class DeadLetterNotReordered(Plant):
    """A new leader does not order again what its predecessor had ordered."""

    what = "dead letters are not re-emitted at takeover"
    why = "the timer for unconfirmed dead letters orders it again 30 s later"

    def patches(self) -> list[tuple[Any, str, Any]]:
        become = coordinator.Coordinator._become_leader

        def forgetful(self: coordinator.Coordinator, now_ms: int) -> None:
            become(self, now_ms)
            self._out = [x for x in self._out if not isinstance(x, e.WriteDeadLetter)]

        return [(coordinator.Coordinator, "_become_leader", forgetful)]


class DeadLetterLost(DeadLetterNotReordered):
    """The same, and the timer is missing too."""

    what = "dead letters are neither re-emitted at takeover nor by the timer"
    why = ""
    seed = 48

    def patches(self) -> list[tuple[Any, str, Any]]:
        def never(self: coordinator.Coordinator, now_ms: int) -> None:
            return

        return [*super().patches(), (coordinator.Coordinator, "_mind_dead_letters", never)]


class RetryWithoutFence(Plant):
    """A retry keeps the number of the attempt before it, for the leader and for every reader."""

    what = "a retry has no fencing number of its own"
    seed = 0

    def patches(self) -> list[tuple[Any, str, Any]]:
        plan = cycle.Cycle._8_placements
        apply = PoolState._assigned

        def same_number(self: cycle.Cycle) -> None:
            plan(self)
            self.batch.decisions[:] = [
                msgspec.structs.replace(d, attempt=1) if isinstance(d, Assigned) else d
                for d in self.batch.decisions
            ]

        def lenient(self: PoolState, decision: Assigned, at: Any) -> None:
            job = self.jobs[decision.job]
            if job.attempt:
                job.attempt -= 1
                job.attempts = job.attempts[:-1]
            apply(self, decision, at)

        return [(cycle.Cycle, "_8_placements", same_number), (PoolState, "_assigned", lenient)]


class IntakeSkips(Plant):
    """A new leader opens its intake one record past what the ledger decided."""

    what = "a submission that was read and not decided is skipped at takeover"
    seed = 2

    def patches(self) -> list[tuple[Any, str, Any]]:
        def late(*, topic: str, partition: int, next_offset: int) -> e.Position:
            more = 1 if topic.startswith("queue.") else 0
            return e.Position(topic=topic, partition=partition, next_offset=next_offset + more)

        return [(coordinator, "Position", late)]


class GpuGivenTwice(Plant):
    """The scheduler forgets which GPUs it gave; neither fold nor agent looks."""

    what = "a GPU is given to two attempts, and neither the fold nor the agent looks"
    seed = 0

    def patches(self) -> list[tuple[Any, str, Any]]:
        reserve, recount = Node.reserve, Node.recount

        def all_free(self: Node) -> None:
            recount(self)
            self.free_gpus = self.capacity.gpus

        def blind(self: Node, job: str, reservation: Any) -> None:
            reserve(self, job, reservation)
            self.free_gpus = self.capacity.gpus

        return [
            (Node, "reserve", blind), (Node, "recount", all_free),
            (AgentCore, "_cannot_hold", lambda self, assign: ""),
        ]  # fmt: skip


class LeaseIgnoredOnRelease(Plant):
    """The leader gives an exclusive attempt up as it gives up any other."""

    what = "the lease of an exclusive attempt is ignored when it is released"
    seed = 49

    def patches(self) -> list[tuple[Any, str, Any]]:
        give_up = leases.LeaseBook.give_up

        def hasty(self: leases.LeaseBook, job: str, outcome: Any, detail: str) -> int:
            give_up(self, job, outcome, detail)
            return 0

        return [(leases.LeaseBook, "give_up", hasty)]


class LeaseFromReceipt(Plant):
    """The node takes the length of a lease and begins to count when the message reaches it."""

    what = "a renewal is counted from its receipt"
    seed = 329

    def patches(self) -> list[tuple[Any, str, Any]]:
        def generous(self: AgentCore, lease: Lease | None) -> int:
            return self._now_ms + lease.length_ms if lease else 0

        return [(AgentCore, "_lease_end", generous)]


def _replace(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


PLANTS: Final[dict[str, type[Plant]]] = {
    "act-before-read-back": ActBeforeReadBack,
    "reader-ignores-term": ReaderIgnoresTerm,
    "late-result-accepted": LateResultAccepted,
    "intent-forgotten-at-takeover": IntentForgottenAtTakeover,
    "released-before-confirmed": ReleasedBeforeConfirmed,
    "duplicate-append-counted": DuplicateAppendCounted,
    "votes-twice": VotesTwice,
    "votes-twice-and-terms-shared": VotesTwiceAndTermsShared,
    "no-resign-on-void": NoResignOnVoid,
    "assigns-to-lost-node": AssignsToLostNode,
    "agent-ignores-term": AgentIgnoresTerm,
    "dead-letter-not-reordered": DeadLetterNotReordered,
    "dead-letter-lost": DeadLetterLost,
    "retry-without-fence": RetryWithoutFence,
    "intake-skips": IntakeSkips,
    "gpu-given-twice": GpuGivenTwice,
    "lease-ignored-on-release": LeaseIgnoredOnRelease,
    "lease-from-receipt": LeaseFromReceipt,
}
"""By the name that `simulate --plant` takes."""
