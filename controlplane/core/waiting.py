"""Why pending jobs fit nowhere, shape by shape, and who of them is still to be told.

Reasons follow from what nodes offer. One change of one offer may change all of them, and finding
them takes shapes times nodes: too long for one piece, for meanwhile the leader hears nobody. So a
cycle looks at as many shapes as it has time for, and the next one goes on behind them.
"""

from collections import deque
from collections.abc import Iterator

from controlplane.core.bounds import WAITING_CHECK_COST, WAITING_CHECKS_MAX
from controlplane.core.matching import device_checks
from dataplane.core.explain import why_unplaceable
from dataplane.core.nodes import Node, Shape
from dataplane.core.pending import ShapeQueue
from dataplane.core.state import PoolState
from idl.ledger import PendingCode


class Told:
    """Why the jobs of a shape fit nowhere (None: they do), and who of them is still to be told.

    Nobody is looked at twice for the same reason: a queue of thousands costs a cycle nothing.
    """

    __slots__ = ("_due", "_joined", "_queue", "nodes_version", "why")

    def __init__(self) -> None:
        self.nodes_version = -1
        self.why: tuple[PendingCode, str] | None = None
        self._due: deque[str] = deque()
        self._queue: ShapeQueue | None = None
        self._joined = 0

    def reason(self, nodes_version: int, why: tuple[PendingCode, str] | None) -> None:
        """Of the nodes as they are now. Another one than before is for everybody again."""
        self.nodes_version = nodes_version
        if why != self.why:
            self.why, self._queue = why, None

    def due(self, queue: ShapeQueue) -> deque[str]:
        """Jobs to be told, those who left meanwhile among them. The caller takes what it told."""
        if self._queue is not queue:  # a shape of which all had left has a new one
            self._queue, self._joined = queue, 0
            self._due.clear()
        if self._joined != queue.joined:
            self._due += queue.latest(self._joined)
            self._joined = queue.joined
        return self._due


class Looks:
    """The nodes, and what it cost so far to look at them."""

    def __init__(self, state: PoolState) -> None:
        self._nodes = state.nodes
        self.checks = 0

    def of(self, shape: Shape) -> Iterator[Node]:
        """All nodes, each counted when it is looked at for `shape`."""
        weight = 1 + device_checks(shape) // WAITING_CHECK_COST
        for node in self._nodes.values():
            self.checks += weight
            yield node


class WaitingBook:
    """Of one leader: the shapes whose pending jobs were looked at."""

    def __init__(self) -> None:
        self._told: dict[Shape, Told] = {}
        self._left: deque[Shape] = deque()
        """Of the walk over all shapes that is under way."""
        self._nodes_version = -1
        """When it began."""

    @property
    def cut_short(self) -> bool:
        """The last look stopped at WAITING_CHECKS_MAX, or its caller stopped it."""
        return bool(self._left)

    def clear(self) -> None:
        """Forgets everything: who leads next tells anew."""
        self._told.clear()
        self._left.clear()

    def look(self, state: PoolState) -> Iterator[tuple[ShapeQueue, Told]]:
        """Goes on with the walk, or begins a new one; finds shapes that fit nowhere now.

        Where the caller stops, the next look begins with the same shape.
        """
        looks, left = Looks(state), self._left
        if not left:
            self._begin(state)
        while left and looks.checks < WAITING_CHECKS_MAX:
            looks.checks += 1
            queue = state.pending.shapes.get(left[0])
            if queue is not None:
                told = self._renewed(left[0], state, looks)
                if told.why is not None:
                    yield queue, told
            left.popleft()
        if not left and self._nodes_version != state.nodes_version:
            self._begin(state)  # those that came first know reasons from before

    def _begin(self, state: PoolState) -> None:
        shapes = state.pending.shapes
        self._left.extend(shapes)
        self._nodes_version = state.nodes_version
        if len(self._told) > 2 * len(shapes):
            self._told = {shape: told for shape, told in self._told.items() if shape in shapes}

    def _renewed(self, shape: Shape, state: PoolState, looks: Looks) -> Told:
        told = self._told.get(shape)
        if told is None:
            told = self._told[shape] = Told()
        if told.nodes_version != state.nodes_version:
            told.reason(state.nodes_version, why_unplaceable(looks.of(shape), shape))
        return told
