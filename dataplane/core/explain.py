"""Why a job is where it is, in words: from the state alone, so any reader of the ledger can tell.

Reasons are named after Kueue's KEP-10852 (pending reasons), as far as this version has them.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from dataplane.core.devices import demand
from dataplane.core.jobs import Job, Phase
from dataplane.core.nodes import Node, Shape, unmet_by_capacity, unmet_by_free_room
from dataplane.core.state import PoolState
from idl.ledger import PendingCode
from idl.units import format_bytes, format_ms

NODE_REASONS_MAX: Final = 50
"""Nodes listed one by one; of a larger pool the message sums up."""

ExplainCode = Literal[
    "Unknown", "Finished", "DeadLettered", "Cancelled", "Running", "Assigned", "BackingOff",
    "LeaseNotOver",
    "NoNodes", "NoMatchingNode", "WaitingForResources", "Ready",
]  # fmt: skip


class NodeReason(msgspec.Struct, frozen=True):
    """Why one node does not take the job now; `why` is "" where it would."""

    node: str
    why: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`position`: place among pending jobs from 1, 0 where the job does not wait."""

    job: str
    code: ExplainCode
    message: str
    position: int = 0
    nodes: tuple[NodeReason, ...] = ()


def _demand(word: str, shape: Shape) -> str:
    kind, _, what = word.partition(":")
    if kind == "cpu":
        return f"{shape.cpu_millis / 1000:g} CPUs"
    if kind == "memory":
        return f"{format_bytes(shape.memory_bytes)} of memory"
    if kind == "enforcement":
        return f"enforcement of {what}"
    if kind == "image":
        return f"image {what}"
    if kind == "label":
        return f"label {what}={dict(shape.labels)[what]}"
    return demand(word, shape.ask, shape.gpus, shape.cpu_millis)


def why_unplaceable(nodes: Iterable[Node], shape: Shape) -> tuple[PendingCode, str] | None:
    """Why no node could take such a job even if it were empty; None where one could.

    The message names what each node lacks, summed up, so that it stays the same until something
    really changes: demands that no node meets, else those that no node meets together.
    """
    unmet: list[tuple[str, ...]] = []
    for node in nodes:
        if node.lost:
            continue
        words = unmet_by_capacity(node, shape) + (("draining",) if node.draining else ())
        if not words:
            return None
        unmet.append(words)
    if not unmet:
        return "NoNodes", "no node has joined the pool; start an agent"
    counts = Counter(word for words in unmet for word in words)
    everywhere = sorted(word for word, count in counts.items() if count == len(unmet))
    if everywhere == ["draining"]:
        return "NoMatchingNode", "every node is draining"
    if everywhere:
        lacking = ", ".join(_demand(word, shape) for word in everywhere if word != "draining")
        return "NoMatchingNode", f"no node offers {lacking}"
    lacking = ", ".join(_demand(word, shape) for word in sorted(counts))
    return "NoMatchingNode", f"no single node offers all of: {lacking}"


def _named(node: Node) -> str:
    """Its name; a simulated node says so wherever it is shown."""
    return f"{node.name} (simulated {node.topology.profile})" if node.simulated else node.name


def _where(state: PoolState, name: str) -> str:
    node = state.nodes.get(name)
    return name if node is None else _named(node)


def _node_reason(node: Node, shape: Shape) -> str:
    if node.lost:
        return f"lost: {node.lost_reason}"
    if node.draining:
        return f"draining: {node.drain_reason}" if node.drain_reason else "draining"
    lacking = unmet_by_capacity(node, shape)
    if lacking:
        return "does not offer " + ", ".join(_demand(word, shape) for word in lacking)
    busy = unmet_by_free_room(node, shape)
    return (
        "in use by others: " + ", ".join(_busy(word, node, shape) for word in busy) if busy else ""
    )


_IN_PLACE: Final = {"gpu_links": "NVLinks", "numa": "one NUMA domain", "cores": "whole cores"}


def _busy(word: str, node: Node, shape: Shape) -> str:
    """What is taken; where enough is free in sum and not in one place, it says so."""
    enough = len(node.free_gpus) >= shape.gpus and node.free_cpu_millis >= shape.cpu_millis
    if word in _IN_PLACE and enough:
        return f"{_IN_PLACE[word]} (free in sum, not in one place)"
    return word if word in ("cpu", "memory", "gpus") else _demand(word, shape)


def _explain_ended(state: PoolState, job_id: str) -> Explanation:
    ended = state.ended.get(job_id)
    if ended is None:
        message = "no such job in the ledger's memory; was it submitted, and to this pool?"
        return Explanation(job=job_id, code="Unknown", message=message)
    if ended.phase is Phase.FINISHED:
        message = f"finished with attempt {ended.attempt} on {_where(state, ended.node)}"
        return Explanation(job=job_id, code="Finished", message=message)
    if ended.phase is Phase.CANCELLED:
        return Explanation(job=job_id, code="Cancelled", message=ended.reason or "cancelled")
    message = f"{ended.code}: {ended.reason}"
    return Explanation(job=job_id, code="DeadLettered", message=message)


def _explain_waiting(state: PoolState, job: Job) -> Explanation:
    position = state.pending.ahead_of(job.rank) + 1
    nodes = sorted(state.nodes.values(), key=lambda node: node.name)
    reasons = tuple(NodeReason(_named(n), _node_reason(n, job.shape)) for n in nodes)
    shown = reasons[:NODE_REASONS_MAX]
    never = why_unplaceable(nodes, job.shape)
    if never is not None:
        return Explanation(
            job=job.id, code=never[0], message=never[1], position=position, nodes=shown
        )
    if all(reason.why for reason in reasons):
        return Explanation(
            job=job.id, code="WaitingForResources",
            message="the nodes that could run it are in use; it starts when room returns",
            position=position, nodes=shown,
        )  # fmt: skip
    return Explanation(
        job=job.id, code="Ready", message="there is room; it is placed in its turn",
        position=position, nodes=shown,
    )  # fmt: skip


def _explain_lease(
    state: PoolState, job: Job, awaited: tuple[int, int], now_ms: int
) -> Explanation:
    """`awaited`: of which term, until when. A leader of another term counts anew (ADR 0011)."""
    term, until_ms = awaited
    node = state.nodes[job.node]
    gone = f"is lost ({node.lost_reason})" if node.lost else "does not list it"
    left = f"in {format_ms(until_ms - now_ms)}" if until_ms > now_ms else "now"
    ends = left if term == state.term else "one lease after the change of leaders"
    message = (
        f"attempt {job.attempt} is given up, for {job.node} {gone}; the job is exclusive, so the "
        f"next attempt waits until the lease of this one must be over: {ends}"
    )
    return Explanation(job=job.id, code="LeaseNotOver", message=message)


def explain(state: PoolState, job_id: str, now_ms: int) -> Explanation:
    """Why `job_id` is where it is at `now_ms` (epoch ms)."""
    job = state.jobs.get(job_id)
    if job is None:
        return _explain_ended(state, job_id)
    cancelling = "; it is being cancelled" if job.cancel_requested else ""
    if job.lease_awaited is not None:
        return _explain_lease(state, job, job.lease_awaited, now_ms)
    if job.phase is Phase.RUNNING:
        message = f"attempt {job.attempt} runs on {_where(state, job.node)}{cancelling}"
        return Explanation(job=job_id, code="Running", message=message)
    if job.phase is Phase.ASSIGNED:
        where = _where(state, job.node)
        message = f"attempt {job.attempt} was given to {where}, which starts it{cancelling}"
        return Explanation(job=job_id, code="Assigned", message=message)
    if job.phase is Phase.BACKING_OFF and job.not_before_ms > now_ms:
        last = job.attempts[-1]
        message = (
            f"attempt {last.attempt} ended as {last.outcome}; the next may start in "
            f"{format_ms(job.not_before_ms - now_ms)}"
        )
        return Explanation(job=job_id, code="BackingOff", message=message)
    return _explain_waiting(state, job)
