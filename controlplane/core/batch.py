"""One ledger entry under construction: bounded, and touching each job for one cause only.

Decisions apply in order, so that room freed by a release is there for an assignment after it.
"""

from controlplane.core.bounds import DECISION_BYTES
from dataplane.core.nodes import Reservation
from dataplane.core.state import PoolState
from idl.ledger import Decision
from idl.limits import LEDGER_BATCH_BYTES_MAX, LEDGER_BATCH_DECISIONS_MAX


class Batch:
    """Collects decisions against one frozen state."""

    def __init__(self, state: PoolState) -> None:
        self.state = state
        self.decisions: list[Decision] = []
        self.size_bytes = 0
        """Estimate of the encoded size."""
        self.touched: set[str] = set()
        """Jobs that this entry is about: nothing else is decided about them in it."""
        self.ingested: set[str] = set()
        """Jobs that this entry brings in."""
        self.nodes_changed: set[str] = set()
        """Nodes whose offer this entry changes: no placement there before it is applied."""
        self.freed: dict[str, list[Reservation]] = {}
        """By node: what releases of this entry give back."""

    def has_room(self, decisions: int = 1, size_bytes: int = 0) -> bool:
        """True where this many more fit, with `size_bytes` of text and specs between them."""
        return (
            len(self.decisions) + decisions <= LEDGER_BATCH_DECISIONS_MAX
            and self.size_bytes + decisions * DECISION_BYTES + size_bytes <= LEDGER_BATCH_BYTES_MAX
        )

    @property
    def left(self) -> int:
        """Decisions that still fit by number."""
        return LEDGER_BATCH_DECISIONS_MAX - len(self.decisions)

    def add(self, *decisions: Decision, job: str = "", size_bytes: int = 0) -> None:
        """Adds decisions; `job` is the job that they are about, if any."""
        self.decisions.extend(decisions)
        self.size_bytes += len(decisions) * DECISION_BYTES + size_bytes
        if job:
            self.touched.add(job)

    def free(self, job: str) -> None:
        """Notes that the current attempt of `job` gives its room back in this entry."""
        node = self.state.jobs[job].node
        self.freed.setdefault(node, []).append(self.state.nodes[node].attempts[job])
