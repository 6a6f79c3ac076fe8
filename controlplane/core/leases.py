"""Leases of exclusive attempts as one leader grants and counts them (ADR 0011).

A node's stamp (its own clock, in its statuses) may be used for a lease once an entry that was
appended after the stamp arrived was read back as valid: then the stamp is older than any
successor's term, and a successor that counts one lease from its first valid entry counts enough.
The leader itself counts from the stamp's arrival, which is later than the stamp. Soft state:
dropped with the role; what it leads to counts once it is in the ledger.
"""

from collections.abc import Iterable
from typing import NamedTuple

from controlplane.core.bounds import (
    LEASE_DRIFT_PER_MILLE,
    LEASE_KILL_MS,
    LEASE_LOOK_MS,
    LEASE_RENEWALS,
)
from dataplane.core.jobs import Job
from dataplane.core.state import PoolState
from idl.control import Lease, RenewIntent
from idl.records import Outcome


class _Stamp(NamedTuple):
    """`after_seq`: our last entry when it arrived; a later one must be read back before its use."""

    since_ms: int
    heard_ms: int
    after_seq: int


class _Stamps:
    """Of one node: the newest that may be used, and one that waits for an entry."""

    __slots__ = ("incarnation", "usable", "waiting")

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.usable: _Stamp | None = None
        self.waiting: _Stamp | None = None


class _Out:
    """One exclusive attempt that is out."""

    __slots__ = ("attempt", "counted_ms", "given_up", "held", "lease_ms", "releasing", "renewed")

    def __init__(self, job: Job, counted_ms: int) -> None:
        self.attempt, self.lease_ms = job.attempt, job.lease_ms
        self.counted_ms = counted_ms
        """When the newest stamp that was used arrived, or when this leader's term began."""
        self.held = self.renewed = self.releasing = False
        self.given_up: tuple[Outcome, str] | None = None


class LeaseBook:
    """Outstanding leases of one leader. Without exclusive attempts it costs next to nothing."""

    def __init__(self) -> None:
        self._since_ms = 0
        self._seq = self._confirmed_seq = 0
        self._stamps: dict[str, _Stamps] = {}
        self._out: dict[str, _Out] = {}
        self._look_ms = 0
        self.unconfirmed = False
        """Renewals are due, and no entry was read back since the stamps came."""

    def clear(self) -> None:
        """No longer leads."""
        self._stamps.clear()
        self._out.clear()
        self._look_ms, self.unconfirmed = 0, False

    def lead(self, state: PoolState, now_ms: int) -> None:
        """The term is this leader's: whatever was granted before ends within a lease of now."""
        self.clear()
        self._since_ms = now_ms
        for node in state.nodes.values():
            for job in node.attempts:
                self.follow(state.jobs[job])

    # --- facts --------------------------------------------------------------------------------

    def follow(self, job: Job) -> None:
        """Its current attempt is out."""
        if job.lease_ms:
            self._out[job.id] = _Out(job, self._since_ms)

    def settle(self, job: str) -> None:
        """The attempt's end is in the ledger."""
        self._out.pop(job, None)

    def appended(self, seq: int) -> None:
        """Our entry `seq` is on its way to the ledger; it counts from 1 in every term."""
        self._seq = seq
        if seq == 1:
            self._confirmed_seq = 0

    def confirmed(self, seq: int) -> None:
        """Our entry `seq` was read back as valid."""
        self._confirmed_seq = seq
        if self.unconfirmed:
            self.unconfirmed, self._look_ms = False, 0

    def heard(self, node: str, incarnation: int, stamp_ms: int, now_ms: int) -> None:
        """A status of the node arrived."""
        if not stamp_ms:
            return
        stamps = self._stamps.get(node)
        if stamps is None or stamps.incarnation != incarnation:
            stamps = self._stamps[node] = _Stamps(incarnation)
        self._promote(stamps)
        if stamps.waiting is None or stamps.waiting.after_seq == self._seq:
            stamps.waiting = _Stamp(stamp_ms, now_ms, self._seq)

    def _promote(self, stamps: _Stamps) -> None:
        if stamps.waiting is not None and stamps.waiting.after_seq < self._confirmed_seq:
            stamps.usable, stamps.waiting = stamps.waiting, None

    def listed(self, job: str, *, held: bool) -> None:
        """The node lists the current attempt."""
        out = self._out.get(job)
        if out is not None:
            out.held = held

    def back(self, jobs: Iterable[str]) -> None:
        """Their node is back in the ledger: what it holds, it may keep."""
        for job in jobs:
            out = self._out.get(job)
            if out is not None:
                out.given_up = None

    # --- grants -------------------------------------------------------------------------------

    def grant(self, state: PoolState, job: Job) -> Lease | None:
        """A lease for the current attempt, if there may be one now."""
        out, node = self._out.get(job.id), state.nodes[job.node]
        stamps = self._stamps.get(job.node)
        if out is None or out.given_up or out.releasing or stamps is None or node.lost:
            return None
        self._promote(stamps)
        stamp = stamps.usable
        if stamp is None or not stamps.incarnation == node.incarnation == job.incarnation:
            return None
        out.counted_ms = max(out.counted_ms, stamp.heard_ms)
        out.renewed = True
        return Lease(since_ms=stamp.since_ms, length_ms=out.lease_ms)

    def renewals(self, state: PoolState, now_ms: int) -> list[tuple[str, RenewIntent]]:
        """(node, renewal) that are due, looked for at most every LEASE_LOOK_MS."""
        if now_ms < self._look_ms:
            return []
        self._look_ms, self.unconfirmed = now_ms + LEASE_LOOK_MS, False
        found: list[tuple[str, RenewIntent]] = []
        for job_id, out in self._out.items():
            job = state.jobs[job_id]
            stamps = self._stamps.get(job.node)
            if stamps is None or out.given_up or not self._is_due(out, now_ms):
                continue
            self._promote(stamps)
            newest = stamps.usable
            if newest is None or (out.renewed and newest.heard_ms <= out.counted_ms):
                self.unconfirmed |= stamps.waiting is not None
            elif out.held:
                lease = self.grant(state, job)
                if lease is not None:
                    renewal = RenewIntent(job=job_id, attempt=out.attempt, lease=lease)
                    found.append((job.node, renewal))
        return found

    @staticmethod
    def _is_due(out: _Out, now_ms: int) -> bool:
        return not out.renewed or now_ms - out.counted_ms >= out.lease_ms // LEASE_RENEWALS

    @property
    def out(self) -> int:
        """How many exclusive attempts are out."""
        return len(self._out)

    # --- attempts given up --------------------------------------------------------------------

    def give_up(self, job: str, outcome: Outcome, detail: str) -> int:
        """No lease is granted from now on; when the last one must have ended, by our clock."""
        out = self._out[job]
        out.given_up = (outcome, detail)
        return out.counted_ms + out.lease_ms + margin_ms(out.lease_ms)

    def release(self, job: str) -> None:
        """Its release is on its way to the ledger: the node may say what it likes."""
        self._out[job].releasing = True

    def given_up(self) -> list[tuple[str, int, Outcome, str]]:
        """(job, attempt, outcome, detail) of attempts that wait for the end of their lease."""
        return [(job, out.attempt, *out.given_up) for job, out in self._out.items() if out.given_up]

    def next_look_ms(self, now_ms: int) -> int:
        """When there may be something to do without any event; 0: nothing."""
        return max(self._look_ms, now_ms + 1) if self._out else 0


def margin_ms(lease_ms: int) -> int:
    """How much longer than the lease the leader waits: clocks of different speed, and the kill."""
    return lease_ms * LEASE_DRIFT_PER_MILLE // 1_000 + LEASE_KILL_MS
