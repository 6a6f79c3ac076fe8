"""Prometheus metrics of an agent."""

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from idl.control import NodePressure
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
        self._disk = Gauge(
            "outrider_state_disk_free_bytes", "Room for the agent's state.", names
        ).labels(**self._labels)
        self._draining = Gauge(
            "outrider_node_draining", "1: the node takes no new work now.", names
        ).labels(**self._labels)
        gpu_names = [*names, "gpu"]
        self._gpus = {
            "temperature_c": Gauge(
                "outrider_gpu_temperature_celsius", "Temperature of the die.", gpu_names
            ),
            "power_mw": Gauge("outrider_gpu_power_milliwatts", "Of the board.", gpu_names),
            "memory_used_bytes": Gauge(
                "outrider_gpu_memory_used_bytes", "Memory in use by anybody.", gpu_names
            ),
            "processes": Gauge("outrider_gpu_processes", "Compute processes.", gpu_names),
            "uncorrected_errors": Gauge(
                "outrider_gpu_uncorrected_errors", "Double-bit ECC errors.", gpu_names
            ),
        }
        self._healthy = Gauge(
            "outrider_gpu_healthy", "1: offered; 0: taken out of the capacity.", gpu_names
        )
        self._pressure = Gauge(
            "outrider_node_pressure_percent",
            "Share of the last ten seconds in which some task of the node waited (PSI).",
            [*names, "resource"],
        )
        self._counted: dict[str, int] = {}

    def gpu(self, uuid: str, healthy: bool, readings: Mapping[str, int | None]) -> None:
        """How one GPU does; readings that the driver does not give keep their last value."""
        self._healthy.labels(**self._labels, gpu=uuid).set(int(healthy))
        for name, value in readings.items():
            if value is not None:
                self._gpus[name].labels(**self._labels, gpu=uuid).set(value)

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

    def pressure(self, now: NodePressure | None) -> None:
        """The node's pressure as of now; None: this kernel does not tell."""
        for resource in ("cpu", "memory", "io") if now is not None else ():
            share = getattr(now, resource)
            self._pressure.labels(**self._labels, resource=resource).set(share)

    def disk(self, free_bytes: int, draining: bool) -> None:
        """Room on the disk of the state directory; whether the node drains for want of it."""
        self._disk.set(free_bytes)
        self._draining.set(int(draining))

    def observe(self, live: int, link: dict[str, int], intents: dict[str, int]) -> None:
        """Counts as of now."""
        self._running.set(live)
        for reason, count in (*link.items(), *intents.items()):
            grown = count - self._counted.get(reason, 0)
            if grown:
                self._refused.labels(**self._labels, reason=reason).inc(grown)
                self._counted[reason] = count
