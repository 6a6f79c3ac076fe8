"""Prometheus metrics of an agent."""

from prometheus_client import Counter, Gauge, Histogram

from idl.records import AttemptResult


class Metrics:
    """One set per process."""

    def __init__(self, node: str, pool: str) -> None:
        self._labels = {"node": node, "pool": pool}
        names = list(self._labels)
        self._running = Gauge("outrider_attempts_live", "Attempts held.", names).labels(
            **self._labels
        )
        self._ended = Counter("outrider_attempts_ended", "Ended attempts.", [*names, "outcome"])
        self._wall = Histogram(
            "outrider_attempt_wall_seconds", "Wall time of attempts.", names
        ).labels(**self._labels)
        self._refused = Counter(
            "outrider_control_messages_refused", "Refused control messages.", [*names, "reason"]
        )
        self._journal = Gauge(
            "outrider_journal_bytes", "Size of the agent's journal.", names
        ).labels(**self._labels)
        self._adopted = Counter(
            "outrider_attempts_adopted", "Attempts taken over from a former process.", names
        ).labels(**self._labels)
        self._restarts = Counter(
            "outrider_launcher_restarts", "Launchers started because one died.", names
        ).labels(**self._labels)
        self._counted: dict[str, int] = {}

    def ended(self, result: AttemptResult) -> None:
        """One attempt is over."""
        self._ended.labels(**self._labels, outcome=result.outcome).inc()
        self._wall.observe(result.usage.wall_ms / 1000)

    def adopted(self, count: int) -> None:
        """So many attempts of a former process of this agent go on."""
        self._adopted.inc(count)

    def launcher_restarted(self) -> None:
        """The launcher died and another one runs."""
        self._restarts.inc()

    def journal(self, size_bytes: int) -> None:
        """The journal has this size now."""
        self._journal.set(size_bytes)

    def observe(self, live: int, link: dict[str, int], intents: dict[str, int]) -> None:
        """Counts as of now."""
        self._running.set(live)
        for reason, count in (*link.items(), *intents.items()):
            grown = count - self._counted.get(reason, 0)
            if grown:
                self._refused.labels(**self._labels, reason=reason).inc(grown)
                self._counted[reason] = count
