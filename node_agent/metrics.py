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
        self._counted: dict[str, int] = {}

    def ended(self, result: AttemptResult) -> None:
        """One attempt is over."""
        self._ended.labels(**self._labels, outcome=result.outcome).inc()
        self._wall.observe(result.usage.wall_ms / 1000)

    def observe(self, live: int, link: dict[str, int], intents: dict[str, int]) -> None:
        """Counts as of now."""
        self._running.set(live)
        for reason, count in (*link.items(), *intents.items()):
            grown = count - self._counted.get(reason, 0)
            if grown:
                self._refused.labels(**self._labels, reason=reason).inc(grown)
                self._counted[reason] = count
