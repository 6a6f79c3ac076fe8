"""Prometheus metrics of a coordinator: what an operator watches, read off the cores' state."""

import functools

from prometheus_client import Counter, Gauge

from controlplane.core.coordinator import Coordinator, Role
from controlplane.core.election import Election
from idl.control import QueueState


@functools.cache
def _gauge(name: str, about: str, labels: tuple[str, ...] = ("coordinator", "pool")) -> Gauge:
    """One of a name in a process, whatever number of pools it serves."""
    return Gauge(name, about, labels)


@functools.cache
def _counter(name: str, about: str, labels: tuple[str, ...]) -> Counter:
    return Counter(name, about, labels)


class Metrics:
    """One set per pool of the process."""

    def __init__(self, name: str, pool: str) -> None:
        labels = {"coordinator": name, "pool": pool}
        self._term = _gauge("outrider_term", "Highest valid term applied.").labels(**labels)
        self._leading = _gauge("outrider_leading", "1 while this process leads.").labels(**labels)
        self._offset = _gauge("outrider_ledger_offset", "Next ledger offset to apply.").labels(
            **labels
        )
        self._stalled = _gauge(
            "outrider_kafka_stalled", "1 while the ledger takes no appends."
        ).labels(**labels)
        self._stalled_since = _gauge(
            "outrider_kafka_stalled_since_seconds", "When it began (epoch); 0 for no stall."
        ).labels(**labels)
        self._timeout = _gauge(
            "outrider_election_timeout_seconds",
            "Silence after which a leader is replaced: as configured, or stretched (ADR 0014).",
        ).labels(**labels)
        self._configured = _gauge(
            "outrider_election_timeout_configured_seconds", "The same where all runs in time."
        ).labels(**labels)
        self._excuses = _gauge(
            "outrider_election_excuses",
            "How often this process ran too late itself to conclude anything from silence.",
        ).labels(**labels)
        self._refused = _counter(
            "outrider_control_messages_refused", "Refused control messages.",
            (*labels, "reason"),
        )  # fmt: skip
        self._depth = _gauge(
            "outrider_queue_jobs", "Jobs by queue and state.", ("pool", "queue", "state")
        )
        self._diverged = _gauge(
            "outrider_state_diverged", "1 where this state differs from a leader's."
        ).labels(**labels)
        self._snapshot_offset = _gauge(
            "outrider_snapshot_ledger_offset", "Of the last snapshot this process had written."
        ).labels(**labels)
        self._snapshot_seconds = _gauge(
            "outrider_snapshot_seconds", "How long writing it took."
        ).labels(**labels)
        self._labels = labels
        self._patience = (0, 0, 0)
        self._counted: dict[str, int] = {}

    def observe(self, core: Coordinator, election: Election, refused: dict[str, int]) -> None:
        """Reads what changed since the last call; cheap enough for every turn of the loop."""
        self._term.set(core.state.term)
        self._leading.set(1 if core.role is Role.LEADING else 0)
        self._offset.set(core.state.next_offset)
        self._stalled.set(1 if core.kafka_stalled else 0)
        self._stalled_since.set(core.kafka_stalled_since_ms / 1000)
        patience = (election.timing.timeout_ms, election.timeout_ms, election.excuses)
        if patience != self._patience:
            self._configured.set(patience[0] / 1000)
            self._timeout.set(patience[1] / 1000)
            self._excuses.set(patience[2])
            self._patience = patience
        for reason, count in refused.items():
            grown = count - self._counted.get(reason, 0)
            if grown:
                self._refused.labels(**self._labels, reason=reason).inc(grown)
                self._counted[reason] = count

    def diverged(self) -> None:
        """This state and a leader's differ."""
        self._diverged.set(1)

    def snapshot(self, next_offset: int, took_ms: int) -> None:
        """A snapshot was written up to this ledger offset."""
        self._snapshot_offset.set(next_offset)
        self._snapshot_seconds.set(took_ms / 1000)

    def queue(self, state: QueueState) -> None:
        """One queue as the leader published it."""
        self._depth.labels(state.pool, state.queue, "pending").set(state.pending)
        self._depth.labels(state.pool, state.queue, "running").set(state.running)
        self._depth.labels(state.pool, state.queue, "unread").set(state.unread)
