"""Which nodes a shape could ever have: remembered for as long as nodes offer what they offer.

Free room plays no part here. Shapes of which image, limits and labels are the same are of one
*kind*, and all of a kind have the same nodes, few or many. Each look at a node is counted, for a
scheduling cycle has a bound of them.
"""

from controlplane.core.bounds import DEVICE_CHECKS, KIND_SIZE, MATCHES_KEPT_MAX
from dataplane.core.devices import PLAIN
from dataplane.core.nodes import Node, Shape, meets_rules, unmet_by_capacity
from dataplane.core.state import PoolState

Kind = tuple[object, ...]
"""What of a shape has to do with rules."""


def kind_of(shape: Shape) -> Kind:
    """Equal for shapes that `meets_rules` cannot tell apart."""
    return shape.image, shape.require, shape.labels


def device_checks(shape: Shape) -> int:
    """What a look at one node's devices for it counts as; whole cores are counted one by one."""
    if shape.ask == PLAIN:
        return 0
    return 2 * DEVICE_CHECKS if shape.ask.pinned else DEVICE_CHECKS


class Matching:
    """Of one scheduler, between its cycles."""

    def __init__(self) -> None:
        self.checks = 0
        """Nodes looked at since `renew`."""
        self.nowhere: set[Shape] = set()
        """Shapes that no node which takes work could run even if it were empty."""
        self._somewhere: set[Shape] = set()
        self._nodes: list[Node] = []
        self._nodes_version = -1
        self._of_kind: dict[Kind, list[Node]] = {}
        self._kept = 0

    def renew(self, state: PoolState) -> None:
        """Before each cycle: forgets what was known of other offers, and whom nobody waits with."""
        self.checks = 0
        known = len(self.nowhere) + len(self._somewhere)
        if self._nodes_version != state.nodes_version:
            self._nodes_version = state.nodes_version
            self._nodes = [node for node in state.nodes.values() if node.schedulable]
            self.nowhere, self._somewhere = set(), set()
            self._forget_kinds()
        elif known > 2 * len(state.pending.shapes):
            self.nowhere &= state.pending.shapes.keys()
            self._somewhere &= state.pending.shapes.keys()

    def _forget_kinds(self) -> None:
        self._of_kind, self._kept = {}, 0

    def nodes(self, shape: Shape) -> list[Node]:
        """Those that take work and meet the rules of `shape`."""
        kind = kind_of(shape)
        found = self._of_kind.get(kind)
        if found is None:
            self.checks += len(self._nodes)
            found = [node for node in self._nodes if meets_rules(node, shape)]
            if self._kept > MATCHES_KEPT_MAX:
                self._forget_kinds()
            self._of_kind[kind] = found
            self._kept += KIND_SIZE + len(found)
        return found

    def note(self, shape: Shape) -> None:
        """`shape` found no room: is there a node that it could wait for?"""
        if shape not in self._somewhere:
            known = self._somewhere if self._fits_empty(shape) else self.nowhere
            known.add(shape)

    def _fits_empty(self, shape: Shape) -> bool:
        for node in self.nodes(shape):
            self.checks += 1 + device_checks(shape)
            if not unmet_by_capacity(node, shape):
                return True
        return False
