"""Model check: every history of a small scope, by breadth-first search over visited states.

Three coordinators, an election that may do anything, and a log that may take any append at any
time, twice, or never. What is abstract is only the election (any process may be told at any time
that it won any term that is new to it: a superset of every majority and every timing, votes cast
twice included) and the network. What judges entries, folds them and answers events is the real
`TermGate`, `PoolState` and `Coordinator`, run for each local situation once and remembered.

Pauses need no step of their own: a process that does not move is paused. Nor does loss: an append
that never lands is lost. A standby's reading is invisible until it wins; it reads as far as the
search likes at that moment.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from controlplane.core import events as e
from controlplane.core.coordinator import Coordinator, Role, _Flight
from dataplane.core.validity import VALID, TermGate, Verdict
from idl.codec import encode
from idl.errors import InvariantBrokenError
from idl.ids import CoordinatorId, Incarnation, PoolName
from idl.jobs import JobSpec, SourceRef
from idl.ledger import Ingested, LedgerEntry
from idl.members import Members
from idl.settings import NodeTiming, QueuePolicy

NOW_MS: Final = 1_000
"""Time stands still: nothing here may depend on it."""
QUEUE: Final = "default"
TOPIC: Final = "queue.default"


class Scope(NamedTuple):
    """How small the world is."""

    coordinators: int = 3
    terms: int = 2
    entries_per_term: int = 2
    log: int = 4
    crashes: int = 1
    copies: int = 1
    wins: int = 3


SCOPES: Final[dict[str, Scope]] = {
    "copies and a crash": Scope(wins=2),
    "three elections": Scope(copies=0),
    "three terms": Scope(terms=3, entries_per_term=1, log=3, copies=0),
}
"""What the tests explore: half a minute together. The wide scope is `Scope()` itself."""


class Local(NamedTuple):
    """One coordinator process. `read_to`: how much of the log it applied; `flight`: an entry."""

    incarnation: int
    role: str
    term: int
    seq: int
    read_to: int
    flight: int


class State(NamedTuple):
    """A state of the world. Entries are numbers (`Model.entries`); `air` is sorted."""

    log: tuple[int, ...]
    air: tuple[int, ...]
    processes: tuple[Local, ...]
    crashes: int
    copies: int
    wins: int
    """What is left of the budgets: restarts, double appends, elections won."""


class Broken(NamedTuple):
    """A property that fails, and the shortest way there."""

    what: str
    way: tuple[str, ...]


class Result(NamedTuple):
    """What a search found."""

    states: int
    transitions: int
    logs: int
    situations: int
    seconds: float
    broken: Broken | None


STANDBY: Final = Local(1, "standby", 0, 0, 0, -1)


class Model:
    """One search. The memories (`_answers`, `_logs`) hold what the real code said."""

    file: Members = ()
    """The membership of the cluster file; nothing here asks for it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.entries: list[LedgerEntry] = []
        self._numbers: dict[bytes, int] = {}
        self._answers: dict[tuple[Any, ...], tuple[Local, tuple[int, ...]]] = {}
        self._gates: dict[tuple[int, ...], tuple[int, str, int, int]] = {(): (0, "", 0, 0)}
        self._logs: dict[tuple[int, ...], str] = {}

    # --- what the real code says --------------------------------------------------------------

    def _number(self, entry: LedgerEntry) -> int:
        key = encode(entry)
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.entries)
            self.entries.append(entry)
        return found

    def _core(self, who: int, local: Local, prefix: tuple[int, ...]) -> Coordinator:
        """The real coordinator in this situation."""
        core = Coordinator(
            CoordinatorId(f"c{who + 1}"), Incarnation(local.incarnation), PoolName("main"),
            {QUEUE: QueuePolicy()}, NodeTiming(), self.file,
        )  # fmt: skip
        for offset, number in enumerate(prefix):
            core.step(e.LedgerRead(offset=offset, entry=self.entries[number]), NOW_MS)
        if local.role != Role.STANDBY:
            core.role, core.term, core._seq = Role(local.role), local.term, local.seq
            if local.flight >= 0:
                core._flight = _Flight(self.entries[local.flight], NOW_MS)
            core._inbox.open(core.state.positions)
        return core

    def _answer(
        self, who: int, local: Local, prefix: tuple[int, ...], event: str, detail: int = 0
    ) -> tuple[Local, tuple[int, ...]]:
        """What the real coordinator does: its next situation and its appends."""
        key = (who, local, prefix, event, detail)
        found = self._answers.get(key)
        if found is None:
            core = self._core(who, local, prefix)
            effects = core.step(self._event(core, prefix, event, detail), NOW_MS)
            appends = tuple(self._number(x.entry) for x in effects if isinstance(x, e.Append))
            flight = core._flight
            after = Local(
                local.incarnation, str(core.role), core.term,
                0 if core.role is Role.STANDBY else core._seq, len(prefix) + (event == "read"),
                -1 if flight is None else self._number(flight.entry),
            )  # fmt: skip
            found = self._answers[key] = (after, appends)
        return found

    def _event(
        self, core: Coordinator, prefix: tuple[int, ...], event: str, detail: int
    ) -> e.CoordinatorEvent:
        if event == "read":
            return e.LedgerRead(offset=len(prefix), entry=self.entries[detail])
        if event == "win":
            return e.RoleWon(term=detail)
        if event == "lose":
            return e.RoleLost(reason="model")
        offset = core.state.positions.get((TOPIC, 0), 0)
        source = SourceRef(topic=TOPIC, partition=0, offset=offset)
        job = JobSpec(id=f"j{offset}", command=("true",))
        record = e.Submission(source=source, queue=QUEUE, spec=job)
        return e.SubmissionsRead(term=core.term, submissions=(record,))

    def _gate(self, log: tuple[int, ...]) -> tuple[int, str, int, int]:
        """The memory of a fresh reader that read `log`: (term, leader, incarnation, seq)."""
        found = self._gates.get(log)
        if found is None:
            term, leader, incarnation, seq = self._gate(log[:-1])
            gate = TermGate()
            gate.term, gate.leader, gate.incarnation, gate.seq = term, leader, incarnation, seq
            gate.next_offset = len(log) - 1
            gate.judge(len(log) - 1, self.entries[log[-1]])
            found = self._gates[log] = (gate.term, gate.leader, gate.incarnation, gate.seq)
        return found

    # --- properties ---------------------------------------------------------------------------

    def _wrong_with_log(self, log: tuple[int, ...]) -> str:
        """Why the valid entries of this log are not one history; "" where they are."""
        if not log:
            return ""
        found = self._logs.get(log)
        if found is not None:
            return found
        found = self._wrong_with_log(log[:-1]) or self._wrong_with_last(log)
        self._logs[log] = found
        return found

    def _wrong_with_last(self, log: tuple[int, ...]) -> str:
        owners: dict[int, tuple[str, int]] = {}
        seqs: dict[int, int] = {}
        highest, jobs = 0, set()
        gate = TermGate()
        for offset, number in enumerate(log):
            entry = self.entries[number]
            if not gate.judge(offset, entry).valid:
                continue
            if entry.term < highest:
                return f"term {entry.term} counts after term {highest} was started"
            mine = (entry.leader, entry.incarnation)
            if owners.setdefault(entry.term, mine) != mine:
                return f"term {entry.term} has valid decisions of {owners[entry.term]} and {mine}"
            if entry.seq != seqs.get(entry.term, 0) + 1:
                return f"entry {entry.term}.{entry.seq} follows {seqs.get(entry.term, 0)}"
            highest, seqs[entry.term] = entry.term, entry.seq
            for decision in entry.decisions:
                if isinstance(decision, Ingested):
                    if decision.source in jobs:
                        return f"{decision.source} was decided twice"
                    jobs.add(decision.source)
        fresh = (gate.term, gate.leader, gate.incarnation, gate.seq)
        return "" if fresh == self._gate(log) else "a reader that resumed differs from a fresh one"

    def wrong(self, state: State) -> str:
        """The first property that this state breaks, or ""."""
        found = self._wrong_with_log(state.log)
        if found:
            return found
        leading: dict[int, int] = {}
        for who, local in enumerate(state.processes):
            if local.role != Role.LEADING:
                continue
            if local.term in leading:
                return f"two processes lead term {local.term}"
            leading[local.term] = who
            gate = self._gate(state.log[: local.read_to])
            if gate[:3] != (local.term, f"c{who + 1}", local.incarnation):
                return f"c{who + 1} leads term {local.term} having read of {gate}"
        return ""

    # --- steps --------------------------------------------------------------------------------

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """Everything that may happen next."""
        yield from self._landings(state)
        untouched = False
        for who, local in enumerate(state.processes):
            if local.role == Role.STANDBY:
                if local == STANDBY and untouched:
                    continue  # processes that did nothing yet are alike
                untouched |= local == STANDBY
                yield from self._wins(state, who, local)
            else:
                yield from self._acts(state, who, local)

    def _landings(self, state: State) -> Iterator[tuple[str, State]]:
        if len(state.log) >= self.scope.log:
            return
        for index, number in enumerate(state.air):
            if index and state.air[index - 1] == number:
                continue
            log = (*state.log, number)
            air = state.air[:index] + state.air[index + 1 :]
            entry = self.entries[number]
            told = f"lands {entry.term}.{entry.seq} by {entry.leader}/{entry.incarnation}"
            yield told, state._replace(log=log, air=air)
            if state.copies:
                twice = state._replace(log=log, copies=state.copies - 1)
                yield told + " (and once more later)", twice

    def _wins(self, state: State, who: int, local: Local) -> Iterator[tuple[str, State]]:
        if not state.wins:
            return
        for read_to in range(local.read_to, len(state.log) + 1):
            prefix = state.log[:read_to]
            known = self._gate(prefix)[0]
            for term in range(known + 1, self.scope.terms + 1):
                after, appends = self._answer(
                    who, local._replace(read_to=read_to), prefix, "win", term
                )
                told = f"c{who + 1} wins term {term} having read {read_to}"
                yield told, self._with(state, who, after, appends)._replace(wins=state.wins - 1)

    def _acts(self, state: State, who: int, local: Local) -> Iterator[tuple[str, State]]:
        prefix, name = state.log[: local.read_to], f"c{who + 1}"
        if local.read_to < len(state.log):
            number = state.log[local.read_to]
            after, appends = self._answer(who, local, prefix, "read", number)
            yield f"{name} reads {local.read_to}", self._with(state, who, after, appends)
        decides = local.role == Role.LEADING and local.flight < 0
        if decides and local.seq < self.scope.entries_per_term:
            after, appends = self._answer(who, local, prefix, "decide")
            yield f"{name} decides", self._with(state, who, after, appends)
        after, _ = self._answer(who, local, prefix, "lose")
        yield f"{name} loses the role", self._with(state, who, after, ())
        if state.crashes:
            reborn = Local(local.incarnation + 1, "standby", 0, 0, 0, -1)
            crashed = self._with(state, who, reborn, ())
            yield f"{name} crashes", crashed._replace(crashes=state.crashes - 1)

    def _with(self, state: State, who: int, local: Local, appends: tuple[int, ...]) -> State:
        processes = (*state.processes[:who], local, *state.processes[who + 1 :])
        air = tuple(sorted(state.air + appends)) if appends else state.air
        return state._replace(processes=processes, air=air)

    # --- the search ---------------------------------------------------------------------------

    def explore(self) -> Result:
        """Breadth first, so that a way to a broken property is a shortest one."""
        started = time.monotonic()
        scope = self.scope
        first = State(
            (), (), (STANDBY,) * scope.coordinators, scope.crashes, scope.copies, scope.wins
        )
        came: dict[State, tuple[State, str] | None] = {first: None}
        queue = deque([first])
        transitions = 0
        broken: Broken | None = None
        while queue and broken is None:
            state = queue.popleft()
            try:
                for told, after in self.successors(state):
                    transitions += 1
                    if after in came:
                        continue
                    came[after] = (state, told)
                    what = self.wrong(after)
                    if what:
                        broken = Broken(what, _way(came, after))
                        break
                    queue.append(after)
            except InvariantBrokenError as error:
                broken = Broken(f"a core refuses: {error}", _way(came, state))
        return Result(len(came), transitions, len(self._logs), len(self._answers),
                      time.monotonic() - started, broken)  # fmt: skip


def _way(came: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    steps: list[str] = []
    before = came[state]
    while before is not None:
        steps.append(before[1])
        before = came[before[0]]
    return tuple(reversed(steps))


# --- planted bugs -----------------------------------------------------------------------------


def _lenient(*reasons: str) -> Any:
    judge = TermGate._verdict

    def verdict(self: TermGate, entry: LedgerEntry) -> Verdict:
        found = judge(self, entry)
        return VALID if found.reason in reasons else found

    return verdict


PLANTS: Final[dict[str, tuple[str, ...]]] = {
    "ignores-term": ("older_term",),
    "ignores-owner": ("not_the_leader",),
    "ignores-seq": ("duplicate",),
}
"""Reasons for which the ledger's rule is made not to void."""


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The rule without one of its reasons, for the time of a search."""
    judge = TermGate._verdict
    TermGate._verdict = _lenient(*PLANTS[name])  # type: ignore[method-assign]  # that is the bug
    try:
        yield
    finally:
        TermGate._verdict = judge  # type: ignore[method-assign]  # and its end
