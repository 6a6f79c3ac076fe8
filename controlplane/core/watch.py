"""What nodes say about themselves, and what follows from it or from their silence.

Soft state: a standby keeps the last reports so that it starts warm; everything else is dropped
with the role. What follows is only ever *proposed* here; it counts once it is in the ledger.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from controlplane.core.bounds import (
    ATTEMPT_MISSING_MS,
    ATTEMPT_NOT_TAKEN_MS,
    ENDED_WITHOUT_RESULT_MS,
    NODES_MAX,
    RESTARTED_NODE_MISSING_MS,
)
from controlplane.core.intents import IntentBook
from dataplane.core.jobs import Phase, shorten
from dataplane.core.nodes import Node
from dataplane.core.state import PoolState
from idl.control import AttemptStatus, NodeReport
from idl.ids import is_valid_name
from idl.ledger import Capacity, NodeLost, NodeSeen
from idl.records import Outcome
from idl.settings import NodeTiming


class Gone(NamedTuple):
    """An attempt that its node no longer has, or whose result never came."""

    attempt: int
    outcome: Outcome
    detail: str


_RESTARTED: Final[tuple[Outcome, str]] = ("node_lost", "the agent restarted without the attempt")
_FORGOTTEN: Final[tuple[Outcome, str]] = ("platform", "node forgot attempt")
_NOT_TAKEN: Final[tuple[Outcome, str]] = ("platform", "node never took the attempt")


class _Heard:
    """One node's voice."""

    __slots__ = ("ended", "heard_ms", "missing", "report", "since_ms")

    def __init__(self) -> None:
        self.heard_ms = 0
        self.since_ms = 0
        """When its process, by its incarnation, was heard first."""
        self.report: NodeReport | None = None
        self.missing: dict[str, tuple[int, int]] = {}
        """Current attempts that full lists leave out: job → (attempt, since ms)."""
        self.ended: dict[str, tuple[int, int]] = {}
        """Current attempts listed as ended: job → (attempt, since ms)."""


def _offer_of(report: NodeReport) -> NodeSeen:
    """The decision that this report asks for, nonsense numbers straightened."""
    capacity = Capacity(
        cpu_millis=max(report.capacity.cpu_millis, 0),
        memory_bytes=max(report.capacity.memory_bytes, 0),
        gpus=tuple(sorted({index for index in report.capacity.gpus if index >= 0})),
    )
    return NodeSeen(
        node=report.node, incarnation=report.incarnation, capacity=capacity,
        enforces=tuple(sorted(set(report.enforces))), labels=report.labels,
        draining=report.draining, drain_reason=shorten(report.drain_reason),
        topology=report.topology, simulated=report.simulated, images=report.images,
    )  # fmt: skip


def _says_nothing_new(node: Node, seen: NodeSeen) -> bool:
    return (
        not node.lost
        and node.incarnation == seen.incarnation
        and node.capacity == seen.capacity
        and node.enforces == frozenset(seen.enforces)
        and node.labels == seen.labels
        and node.drain_reported == seen.draining
        and node.drain_reason == seen.drain_reason
        and node.topology == seen.topology
        and node.simulated == seen.simulated
        and node.images == seen.images
    )


class Watch:
    """All nodes of the pool as this process hears them."""

    def __init__(self, pool: str, timing: NodeTiming) -> None:
        self._pool = pool
        self._timing = timing
        self._heard: dict[str, _Heard] = {}
        self._listening_since_ms = 0
        self.changed: dict[str, None] = {}
        """Nodes whose report may say something new."""
        self.started: dict[str, int] = {}
        """Job → attempt that its node says runs, while the ledger says assigned."""
        self.gone: dict[str, Gone] = {}
        """Job → attempt to release without a result."""
        self.vacated: dict[str, tuple[tuple[str, int], ...]] = {}
        """Node → attempts given up that its full list leaves out, or has as ended."""

    def listen_anew(self, now_ms: int) -> None:
        """Silence counts from now: a leader starts, or was itself asleep."""
        self._listening_since_ms = now_ms
        for heard in self._heard.values():
            heard.missing.clear()
            heard.ended.clear()

    def lead(self, now_ms: int) -> None:
        """Starts to lead: reports of nodes that were heard lately are looked at again."""
        self.drop()
        self.listen_anew(now_ms)
        lately = now_ms - self._timing.lost_ms
        self.changed = {n: None for n, h in self._heard.items() if h.report and h.heard_ms > lately}

    def drop(self) -> None:
        """No longer leads."""
        self.changed, self.started, self.gone, self.vacated = {}, {}, {}, {}

    # --- messages -----------------------------------------------------------------------------

    def report(self, report: NodeReport, now_ms: int) -> None:
        """Takes a node's report. One of an older process of a node that speaks is ignored."""
        if report.pool != self._pool or not is_valid_name(report.node):
            return
        heard = self._heard.get(report.node)
        if heard is None:
            self._make_room(now_ms)
            heard = self._heard[report.node] = _Heard()
        elif self._outdated(heard, report.incarnation, now_ms):
            return
        if heard.report is None or heard.report.incarnation != report.incarnation:
            heard.since_ms = now_ms
        heard.report, heard.heard_ms = report, now_ms
        self.changed[report.node] = None

    def _outdated(self, heard: _Heard, incarnation: int, now_ms: int) -> bool:
        silent = now_ms - heard.heard_ms >= self._timing.lost_ms
        return heard.report is not None and incarnation < heard.report.incarnation and not silent

    def _make_room(self, now_ms: int) -> None:
        """Keeps the table bounded: the longest silent voice goes."""
        if len(self._heard) >= NODES_MAX:
            del self._heard[min(self._heard, key=lambda name: self._heard[name].heard_ms)]

    def hear(self, status: AttemptStatus, now_ms: int) -> bool:
        """Notes that the node lives. False for a status to ignore: other pool, older process."""
        heard = self._heard.get(status.node)
        if status.pool != self._pool or heard is None or heard.report is None:
            return False  # the report is transient-local: it comes first or soon
        if status.incarnation != heard.report.incarnation:
            return False
        heard.heard_ms = now_ms
        return True

    def status(
        self, status: AttemptStatus, state: PoolState, book: IntentBook, now_ms: int
    ) -> None:
        """What a leader makes of a status; the ledger's view decides which attempts are current."""
        if not self.hear(status, now_ms):
            return
        node = state.nodes.get(status.node)
        if node is None or node.lost or node.incarnation != status.incarnation:
            self.changed[status.node] = None  # it speaks: NodeSeen comes first
            return
        book.leases.heard(node.name, node.incarnation, status.stamp_ms, now_ms)
        heard = self._heard[status.node]
        listed: set[str] = set()
        for view in status.attempts:
            job = state.jobs.get(view.job)
            if job is None or not state.is_current(view.job, view.attempt) or job.node != node.name:
                tell = book.forget if view.phase == "ended" else book.supersede
                tell(node.name, view.job, view.attempt)
                continue
            listed.add(job.id)
            book.acknowledge(job.id, view.attempt)
            book.leases.listed(job.id, held=view.phase != "ended")
            if view.phase == "running" and job.phase is Phase.ASSIGNED:
                self.started[job.id] = view.attempt
            elif view.phase == "ended":
                self._await_result(heard, job.id, view.attempt, now_ms)
        if status.full:
            self._look_for_missing(heard, node, state, book, listed, now_ms)
            if node.given_up:
                held = {(v.job, v.attempt) for v in status.attempts if v.phase != "ended"}
                self.vacated[node.name] = tuple(key for key in node.given_up if key not in held)

    def _await_result(self, heard: _Heard, job: str, attempt: int, now_ms: int) -> None:
        first = heard.ended.get(job)
        if first is None or first[0] != attempt:
            heard.ended[job] = (attempt, now_ms)
        elif now_ms - first[1] >= ENDED_WITHOUT_RESULT_MS:
            self.gone[job] = Gone(attempt, "platform", "attempt ended and its result never came")

    def _look_for_missing(
        self,
        heard: _Heard,
        node: Node,
        state: PoolState,
        book: IntentBook,
        listed: set[str],
        now_ms: int,
    ) -> None:
        """Attempts that full lists leave out for too long; one absence may be an old message."""
        missing: dict[str, tuple[int, int]] = {}
        for name, reservation in node.attempts.items():
            if name in listed:
                continue
            attempt = reservation.attempt
            running = state.jobs[name].phase is Phase.RUNNING
            if reservation.incarnation != node.incarnation:
                grace, gone = RESTARTED_NODE_MISSING_MS, Gone(attempt, *_RESTARTED)
            elif running or book.acknowledged(name, attempt):
                grace, gone = ATTEMPT_MISSING_MS, Gone(attempt, *_FORGOTTEN)
            else:
                grace, gone = ATTEMPT_NOT_TAKEN_MS, Gone(attempt, *_NOT_TAKEN)
            since = heard.missing.get(name, (attempt, now_ms))
            missing[name] = since if since[0] == attempt else (attempt, now_ms)
            if now_ms - missing[name][1] >= grace:
                self.gone[name] = gone
        heard.missing = missing
        heard.ended = {job: since for job, since in heard.ended.items() if job in listed}

    # --- proposals ----------------------------------------------------------------------------

    def seen(self, state: PoolState, name: str) -> NodeSeen | None:
        """The NodeSeen to record for `name`, None where the ledger says so already."""
        heard = self._heard.get(name)
        if heard is None or heard.report is None:
            return None
        node = state.nodes.get(name)
        seen = _offer_of(heard.report)
        if node is not None:
            if _says_nothing_new(node, seen):
                return None
            if seen.incarnation < node.incarnation and not node.lost:
                return None
        return seen

    def silent(self, state: PoolState, now_ms: int) -> Iterator[NodeLost]:
        """Nodes silent for NodeTiming.lost_ms since the later of their last message and the
        moment when this leader began to listen.

        A process older than the ledger's does not speak for its node: its state directory is a new
        one and its clock was set back, so that the attempts of the ledger's are not there.
        """
        for node in state.nodes.values():
            if node.lost:
                continue
            heard = self._heard.get(node.name)
            spoke_ms, why = heard.heard_ms if heard else 0, ""
            if heard and heard.report and heard.report.incarnation < node.incarnation:
                spoke_ms = heard.since_ms
                why = f", but for an agent of an earlier incarnation {heard.report.incarnation}"
            since = max(spoke_ms, self._listening_since_ms)
            if now_ms - since >= self._timing.lost_ms:
                reason = f"silent for {now_ms - since} ms{why}"
                yield NodeLost(node=node.name, incarnation=node.incarnation, reason=reason)
