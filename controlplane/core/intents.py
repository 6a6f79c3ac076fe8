"""What agents still have to be told, and when to tell them again.

Derived from the state: after a takeover it is rebuilt from the ledger. Messages may get lost,
repeated and reordered; every intent is idempotent and re-sent until a status acknowledges it.

An assign is re-sent until its attempt is listed. A cancel is re-sent until the attempt's end is in
the ledger; while its assign is unacknowledged too, both travel together in that order, so that the
agent always has an attempt to end and the ledger never has to guess whether there was one.
"""

from collections.abc import Iterator

import msgspec

from controlplane.core.bounds import INTENT_BYTES_MAX, INTENT_ITEM_BYTES, INTENT_ITEMS_MAX
from controlplane.core.leases import LeaseBook
from dataplane.core.devices import Grant
from dataplane.core.jobs import PLACED, Job
from dataplane.core.nodes import Node
from dataplane.core.state import PoolState
from idl.control import AssignIntent, CancelIntent, ForgetIntent, Intent, IntentItem

_SUPERSEDED = "the attempt is not current any more"


class IntentBook:
    """Outstanding intents of one leader. Nothing in it is the truth; all of it can be rebuilt."""

    def __init__(self, resend_ms: int) -> None:
        self._resend_ms = resend_ms
        self.leases = LeaseBook()
        self._fresh: dict[str, None] = {}
        """Jobs whose current attempt has something to be told at once."""
        self._due: dict[str, int] = {}
        """Jobs told before, by when to tell again; insertion order is due order."""
        self._once: dict[str, dict[tuple[str, int, bool], None]] = {}
        """By node: (job, attempt, forget?) to be told once; the next full status asks again."""
        self._acknowledged: dict[str, int] = {}
        """Jobs whose current attempt a status listed, by attempt."""

    def clear(self) -> None:
        """Forgets everything."""
        for table in (self._fresh, self._due, self._once, self._acknowledged):
            table.clear()
        self.leases.clear()

    def tell(self, job: str) -> None:
        """Its current attempt was assigned, or its cancellation was asked for."""
        self._due.pop(job, None)
        self._fresh[job] = None

    def forget(self, node: str, job: str, attempt: int) -> None:
        """The node need not remember this ended attempt."""
        self._once.setdefault(node, {})[(job, attempt, True)] = None

    def supersede(self, node: str, job: str, attempt: int) -> None:
        """The node runs an attempt that is not current: it shall end it."""
        self._once.setdefault(node, {})[(job, attempt, False)] = None

    def acknowledge(self, job: str, attempt: int) -> None:
        """A status listed the current attempt."""
        self._acknowledged[job] = attempt

    def acknowledged(self, job: str, attempt: int) -> bool:
        """True where the node is known to have had this attempt."""
        return self._acknowledged.get(job) == attempt

    def settle(self, job: str) -> None:
        """The attempt's end is in the ledger."""
        self._fresh.pop(job, None)
        self._due.pop(job, None)
        self._acknowledged.pop(job, None)
        self.leases.settle(job)

    @property
    def next_due_ms(self) -> int | None:
        """When `collect` has something to re-send; None for never."""
        return next(iter(self._due.values()), None)

    def collect(
        self, state: PoolState, pool: str, term: int, leader: str, now_ms: int
    ) -> list[Intent]:
        """What to send now, batched per node and cut to size."""
        names = list(self._fresh)
        self._fresh.clear()
        for name, due_ms in self._due.items():
            if due_ms > now_ms:
                break
            names.append(name)
        by_node: dict[str, list[IntentItem]] = {}
        for name in names:
            self._due.pop(name, None)
            job = state.jobs.get(name)
            if job is None or job.phase not in PLACED:
                continue
            items = self._items(state, job)
            if items:
                by_node.setdefault(job.node, []).extend(items)
            # A lost node may come back and must be told then; a lease may not be granted yet.
            untold = state.nodes[job.node].lost or self._waits_for_lease(job)
            if items or untold:
                self._due[name] = now_ms + self._resend_ms
        for node, told in self._once.items():
            by_node.setdefault(node, []).extend(
                ForgetIntent(job=name, attempt=attempt)
                if forget
                else CancelIntent(job=name, attempt=attempt, why=_SUPERSEDED)
                for name, attempt, forget in told
            )
        self._once.clear()
        for node, renewal in self.leases.renewals(state, now_ms):
            by_node.setdefault(node, []).append(renewal)
        return [
            Intent(
                pool=pool, node=node, node_incarnation=state.nodes[node].incarnation, term=term,
                leader=leader, items=part,
            )
            for node, told_all in by_node.items()
            if node in state.nodes
            for part in _cut(told_all)
        ]  # fmt: skip

    def _taken(self, job: Job) -> bool:
        """The node is known to have the current attempt."""
        return bool(job.started_ms) or self.acknowledged(job.id, job.attempt)

    def _waits_for_lease(self, job: Job) -> bool:
        return bool(job.lease_ms) and not self._taken(job)

    def _items(self, state: PoolState, job: Job) -> tuple[IntentItem, ...]:
        """What the node must still be told about the current attempt of a placed job."""
        node = state.nodes[job.node]
        if node.lost:
            return ()
        items: list[IntentItem] = []
        # A restarted agent is never given an old attempt: its former self may have run it.
        if not self._taken(job) and job.incarnation == node.incarnation:
            lease = self.leases.grant(state, job) if job.lease_ms else None
            if lease is not None or not job.lease_ms:
                items.append(
                    AssignIntent(
                        job=job.id, attempt=job.attempt, queue=job.queue, spec=job.spec,
                        payload=job.payload, lease=lease, **_bound(node, job.id)._asdict(),
                    )
                )  # fmt: skip
        if job.cancel_requested:
            why = f"cancelled by {job.cancel_by}" if job.cancel_by else "cancelled"
            items.append(CancelIntent(job=job.id, attempt=job.attempt, why=why))
        return tuple(items)


def _bound(node: Node, job: str) -> Grant:
    """The attempt's grant, and where one without cores of its own may run: within its domain, and
    not on the cores of others."""
    grant, held = node.attempts[job].grant, node.held.cpus
    if grant.cpus or not (grant.mems or held) or "cpuset" not in node.enforces:
        return grant
    domains = [node.machine.domains[n] for n in grant.mems] or node.machine.domains.values()
    cpus = {cpu for domain in domains for cpu in domain.cpus} - held
    return grant._replace(cpus=tuple(sorted(cpus)))


def _size(item: IntentItem) -> int:
    if isinstance(item, AssignIntent):
        return INTENT_ITEM_BYTES + len(msgspec.json.encode(item.spec))
    return INTENT_ITEM_BYTES


def _cut(items: list[IntentItem]) -> Iterator[tuple[IntentItem, ...]]:
    """Slices of at most INTENT_ITEMS_MAX items and about INTENT_BYTES_MAX bytes, in order."""
    part: list[IntentItem] = []
    size = 0
    for item in items:
        more = _size(item)
        if part and (len(part) >= INTENT_ITEMS_MAX or size + more > INTENT_BYTES_MAX):
            yield tuple(part)
            part, size = [], 0
        part.append(item)
        size += more
    if part:
        yield tuple(part)
