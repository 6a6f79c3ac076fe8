"""Model check of a membership that changes while anybody reads as far as they like (ADR 0012).

As in `chaos.sim.model`, but only those win whom a majority can elect: each process counts by the
membership it has read, and votes by the rules of `Election` (restated in `granters`). The leader is
the real `Coordinator`, given an operator's order at any moment; the ledger is folded by the real
`PoolState`. What must hold in every state, beside the ledger's own rules, is peace: two processes
that can both be elected now need a voter in common.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple

from chaos.sim.model import NOW_MS, Local, Model, Scope, State
from controlplane.core import events as e
from controlplane.core import membership
from controlplane.core.coordinator import Coordinator, Role
from controlplane.core.membership import Voters, majority
from dataplane.core.state import PoolState
from idl.ids import CoordinatorId
from idl.jobs import SourceRef
from idl.members import CoordinatorPeer, Members
from idl.records import AddMember, CommandRecord, RemoveMember

MEMBERS: Final = 3
"""Of the cluster file: c1, c2, c3. The other processes of the scope may be added."""
_ONE_LEADER: Final = Scope(
    coordinators=5, terms=1, entries_per_term=3, log=3, crashes=0, copies=0, wins=1
)
SCOPES: Final = {
    "two are added": _ONE_LEADER,
    "three changes": _ONE_LEADER._replace(coordinators=4, entries_per_term=4, log=4),
    "two leaders": _ONE_LEADER._replace(coordinators=3, terms=2, wins=2),
}
"""What the tests explore, seconds together. Two changes are enough for majorities that could miss
each other: 2 of 3, and 3 of 5 or (one removed, another added) 2 of 3 others."""
WIDE: Final = _ONE_LEADER._replace(coordinators=4, terms=2, log=4, wins=2)
"""A minute and a half: two leaders, and two changes by either."""
ADD, REMOVE = 0, 1


def peer(who: int) -> CoordinatorPeer:
    """Coordinator number `who`, from 0."""
    return CoordinatorPeer(name=CoordinatorId(f"c{who + 1}"), dds_port=7_410 + 2 * who)


class View(NamedTuple):
    """What one process has read: who is a member, by which version, and the ledger's term."""

    version: int
    members: frozenset[int]
    term: int


def granters(views: tuple[View, ...], candidate: int) -> frozenset[int]:
    """Members by the candidate's view that would vote for it: they know no newer membership than
    it does, and both are members in theirs. (`Election._ballot`, `_why_refuse`.)"""
    mine = views[candidate]
    if candidate not in mine.members:
        return frozenset()
    return frozenset(
        voter
        for voter in mine.members
        if voter == candidate
        or (
            {voter, candidate} <= views[voter].members
            and views[voter].version <= mine.version
        )
    )  # fmt: skip


@cache
def split(views: tuple[View, ...]) -> str:
    """Two that could be elected by majorities without a common voter, in words; "" for none."""
    able = []
    for who, view in enumerate(views):
        votes, needed = granters(views, who), majority(len(view.members))
        if len(votes) >= needed:
            able.append((who, votes, needed))
    for index, (one, votes, needed) in enumerate(able):
        for other, others, needs in able[index + 1 :]:
            if len(votes | others) >= needed + needs:
                return f"c{one + 1} and c{other + 1} can be elected by majorities that do not meet"
    return ""


class MembersModel(Model):
    """One search."""

    file: Members = tuple(map(peer, range(MEMBERS)))

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._views: dict[tuple[int, ...], View] = {}

    def _view(self, prefix: tuple[int, ...]) -> View:
        found = self._views.get(prefix)
        if found is None:
            state = PoolState()
            for offset, number in enumerate(prefix):
                state.apply(offset, self.entries[number])
            names = {one.name for one in state.members or self.file}
            members = frozenset(n for n in range(self.scope.coordinators) if peer(n).name in names)
            found = self._views[prefix] = View(state.members_version, members, state.term)
        return found

    def views(self, state: State) -> tuple[View, ...]:
        """What each process has read."""
        return tuple(self._view(state.log[: local.read_to]) for local in state.processes)

    def wrong(self, state: State) -> str:
        """As the ledger's model, and two electorates that do not meet."""
        return super().wrong(state) or split(self.views(state))

    # --- what the real code says --------------------------------------------------------------

    def _event(
        self, core: Coordinator, prefix: tuple[int, ...], event: str, detail: int
    ) -> e.CoordinatorEvent:
        if event != "change":
            return super()._event(core, prefix, event, detail)
        kind, knowing = detail % 2, detail // 2
        view = self._view(prefix)
        names = [peer(n).name for n in sorted(view.members)]
        known = [peer(n).name for n in sorted(view.members) if knowing >> n & 1]
        core.step(e.VotersHeard(voters=Voters(tuple(names), tuple(known))), NOW_MS)
        if kind == ADD:
            new = min(set(range(self.scope.coordinators)) - view.members)
            order: AddMember | RemoveMember = AddMember(member=peer(new))
        else:
            order = RemoveMember(name=peer(max(view.members)).name)
        offset = core.state.positions.get(("commands", 0), 0)
        source = SourceRef(topic="commands", partition=0, offset=offset)
        read = e.CommandRead(source=source, record=CommandRecord(by="model", command=order))
        return e.CommandsRead(term=core.term, commands=(read,))

    # --- steps --------------------------------------------------------------------------------

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """Everything that may happen next."""
        yield from self._landings(state)
        views = self.views(state)
        for who, local in enumerate(state.processes):
            if local.role != Role.STANDBY:
                yield from self._leads(state, views, who, local)
                continue
            yield from self._elections(state, views, who, local)
            if local.read_to < len(state.log):
                further = local._replace(read_to=local.read_to + 1)
                told = f"c{who + 1} reads {local.read_to}"
                yield told, self._with(state, who, further, ())

    def _elections(
        self, state: State, views: tuple[View, ...], who: int, local: Local
    ) -> Iterator[tuple[str, State]]:
        if not state.wins:
            return
        votes = granters(views, who)
        for term in range(views[who].term + 1, self.scope.terms + 1):
            willing = [voter for voter in votes if views[voter].term < term]
            if len(willing) >= majority(len(views[who].members)):
                prefix = state.log[: local.read_to]
                after, appends = self._answer(who, local, prefix, "win", term)
                told = f"c{who + 1} wins term {term} by {len(views[who].members)} members"
                yield told, self._with(state, who, after, appends)._replace(wins=state.wins - 1)

    def _leads(
        self, state: State, views: tuple[View, ...], who: int, local: Local
    ) -> Iterator[tuple[str, State]]:
        prefix, name, view = state.log[: local.read_to], f"c{who + 1}", views[who]
        if local.read_to < len(state.log):
            after, appends = self._answer(who, local, prefix, "read", state.log[local.read_to])
            yield f"{name} reads {local.read_to}", self._with(state, who, after, appends)
        decides = local.role == Role.LEADING and local.flight < 0
        if decides and local.seq < self.scope.entries_per_term:
            knowing = sum(1 << n for n in view.members if views[n].version >= view.version)
            for kind in (ADD, REMOVE):
                if kind == ADD and len(view.members) == self.scope.coordinators:
                    continue
                after, appends = self._answer(who, local, prefix, "change", 2 * knowing + kind)
                told = f"{name} is told to {'remove a member' if kind else 'add a member'}"
                yield told, self._with(state, who, after, appends)
        after, _ = self._answer(who, local, prefix, "lose")
        yield f"{name} loses the role", self._with(state, who, after, ())


@contextlib.contextmanager
def unsettled_allowed() -> Iterator[None]:
    """A bug: the leader makes the next change before a majority knows the last one."""
    asked = membership._unsettled
    membership._unsettled = lambda before, voters: ""
    try:
        yield
    finally:
        membership._unsettled = asked
