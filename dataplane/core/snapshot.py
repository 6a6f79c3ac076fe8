"""A pool's state as one value, and back: recovery = snapshot + tail (DESIGN, `snapshots`).

An image says everything that a state says, in the state's own order; what can be derived (indices,
heaps, free room) is built again. A restored state is the same for every purpose: same hash, same
digest, same decisions from the same tail. Bytes and Kafka are in `dataplane.snapshots`.
"""

from typing import Final, NamedTuple

import msgspec

from dataplane.core.devices import Machine
from dataplane.core.jobs import WAITING, EndedJob, Job, Phase
from dataplane.core.nodes import Node, Reservation
from dataplane.core.state import PoolState, QueueCounters, TermRecord
from idl.jobs import JobSpec, PayloadLocation, SourceRef
from idl.ledger import Capacity
from idl.members import Members
from idl.records import AttemptStory, DeadLetter
from idl.topology import Topology

IMAGE_VERSION: Final = 4
"""Of `Image` and all that it holds. Another one is refused: the ledger has the same, only slower.
Raise it with every change of what a state says, of its hash or of its digest."""


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """Without field names on the wire: there are tens of thousands."""


class JobImage(_Part, frozen=True, array_like=True):
    """One live job."""

    spec: JobSpec
    queue: str
    source: SourceRef
    payload: PayloadLocation | None
    seq: int
    ingested_ms: int
    phase: Phase
    attempt: int
    node: str
    incarnation: int
    gpus: tuple[int, ...]
    lease_ms: int
    lease_awaited: tuple[int, int] | None
    started_ms: int
    started_once: bool
    not_before_ms: int
    waiting: tuple[str, str] | None
    cancel_requested: bool
    cancel_by: str
    attempts: tuple[AttemptStory, ...]
    story: tuple[tuple[int, str], ...]


class NodeImage(_Part, frozen=True, array_like=True):
    """One node; `attempts` in the order in which they were placed."""

    name: str
    incarnation: int
    capacity: Capacity
    enforces: tuple[str, ...]
    labels: dict[str, str]
    drain_reported: bool
    drain_ordered: bool
    lost: bool
    lost_reason: str
    seen_ms: int
    attempts: tuple[tuple[str, Reservation], ...]
    topology: Topology
    simulated: bool
    given_up: tuple[tuple[tuple[str, int], Reservation], ...]
    drain_reason: str = ""
    images: dict[str, str] = {}


class GateImage(NamedTuple):
    """`TermGate`'s memory."""

    term: int
    leader: str
    incarnation: int
    seq: int
    next_offset: int


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a state says after the entries below `gate.next_offset`."""

    v: int = IMAGE_VERSION
    gate: GateImage
    digest: bytes
    at_ms: int
    ingested: int
    terms: tuple[TermRecord, ...]
    void_counts: dict[str, int]
    jobs: tuple[JobImage, ...]
    ended: tuple[EndedJob, ...]
    nodes: tuple[NodeImage, ...]
    orphaning: tuple[str, ...]
    lost_order: tuple[str, ...]
    queues: dict[str, QueueCounters]
    positions: tuple[tuple[str, int, int], ...]
    dead_letters_due: tuple[DeadLetter, ...]
    members: Members = ()
    members_version: int = 0


def image_of(state: PoolState) -> Image:
    """The state as a value. O(n): not for a loop that others wait for."""
    gate = state.gate
    return Image(
        gate=GateImage(gate.term, gate.leader, gate.incarnation, gate.seq, gate.next_offset),
        digest=state.digest, at_ms=state.at_ms, ingested=state.ingested,
        terms=tuple(state.terms), void_counts=dict(state.void_counts),
        jobs=tuple(map(_job_image, state.jobs.values())), ended=tuple(state.ended.values()),
        nodes=tuple(map(_node_image, state.nodes.values())),
        orphaning=tuple(state.orphaning), lost_order=tuple(state.lost_order),
        queues={name: msgspec.structs.replace(q) for name, q in state.queues.items()},
        positions=tuple((topic, p, offset) for (topic, p), offset in state.positions.items()),
        dead_letters_due=tuple(state.dead_letters_due.values()),
        members=state.members, members_version=state.members_version,
    )  # fmt: skip


def restored(image: Image) -> PoolState:
    """A state that is the one the image was made of. Its hash is for the caller to compare."""
    state, gate = PoolState(), image.gate
    state.gate.term, state.gate.leader = gate.term, gate.leader
    state.gate.incarnation, state.gate.seq = gate.incarnation, gate.seq
    state.gate.next_offset = gate.next_offset
    state.digest, state.at_ms, state.ingested = image.digest, image.at_ms, image.ingested
    state.terms.extend(image.terms)
    state.void_counts = dict(image.void_counts)
    state.ended = {ended.id: ended for ended in image.ended}
    state.nodes = {node.name: _node(node) for node in image.nodes}
    state.orphaning = dict.fromkeys(image.orphaning)
    state.lost_order = dict.fromkeys(image.lost_order)
    state.queues = {name: msgspec.structs.replace(q) for name, q in image.queues.items()}
    state.positions = {(topic, p): offset for topic, p, offset in image.positions}
    state.dead_letters_due = {letter.key: letter for letter in image.dead_letters_due}
    state.members, state.members_version = image.members, image.members_version
    for one in image.jobs:
        _index(state, _job(one))
    return state


def _index(state: PoolState, job: Job) -> None:
    state.jobs[job.id] = job
    if job.phase is Phase.PENDING:
        state.pending.add(job.shape, job.rank, job.id)
    elif job.phase is Phase.BACKING_OFF:
        state.watch_back_off(job)
    if job.phase in WAITING:
        state.watch_deadline(job)


def _job_image(job: Job) -> JobImage:
    return JobImage(
        job.spec, job.queue, job.source, job.payload, job.seq, job.ingested_ms, job.phase,
        job.attempt, job.node, job.incarnation, job.gpus, job.lease_ms, job.lease_awaited,
        job.started_ms, job.started_once,
        job.not_before_ms, job.waiting, job.cancel_requested, job.cancel_by,
        job.attempts, tuple(job.story),
    )  # fmt: skip


def _job(image: JobImage) -> Job:
    job = Job(image.spec, image.queue, image.source, image.payload, image.seq, image.ingested_ms)
    job.phase, job.attempt = image.phase, image.attempt
    job.node, job.incarnation, job.gpus = image.node, image.incarnation, image.gpus
    job.lease_ms, job.lease_awaited = image.lease_ms, image.lease_awaited
    job.started_ms, job.started_once = image.started_ms, image.started_once
    job.not_before_ms, job.waiting = image.not_before_ms, image.waiting
    job.cancel_requested, job.cancel_by = image.cancel_requested, image.cancel_by
    job.attempts, job.story = image.attempts, list(image.story)
    return job


def _node_image(node: Node) -> NodeImage:
    return NodeImage(
        node.name, node.incarnation, node.capacity, tuple(sorted(node.enforces)),
        dict(node.labels), node.drain_reported, node.drain_ordered, node.lost, node.lost_reason,
        node.seen_ms, tuple(node.attempts.items()), node.topology, node.simulated,
        tuple(node.given_up.items()),
        node.drain_reason, dict(node.images),
    )  # fmt: skip


def _node(image: NodeImage) -> Node:
    node = Node(image.name)
    node.incarnation, node.capacity = image.incarnation, image.capacity
    node.enforces, node.labels = frozenset(image.enforces), dict(image.labels)
    node.drain_reported, node.drain_ordered = image.drain_reported, image.drain_ordered
    node.drain_reason, node.images = image.drain_reason, dict(image.images)
    node.lost, node.lost_reason = image.lost, image.lost_reason
    node.seen_ms, node.attempts = image.seen_ms, dict(image.attempts)
    node.topology, node.simulated = image.topology, image.simulated
    node.machine = Machine(image.topology, image.capacity.gpus)
    node.given_up = dict(image.given_up)
    node.recount()
    return node
