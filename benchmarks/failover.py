"""Losing the leader: from the fault to the first valid decision of the next one, read back from the
ledger by an outside reader; beside it, a three-member etcd losing its leader the same way, from the
fault to the next accepted write.

Faults are spread uniformly within the heartbeat. Under load: real jobs at a steady rate, and
records that cost a decision but no sandbox (repeated ids), so that a leader always has something
to decide. After `--block` faults a new cluster is started: the embedded broker's fetch costs time
in proportion to the batches of the partition (docs/benchmarks.md), and a ledger of a hundred
thousand entries would measure that.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.etcd import Etcd
from benchmarks.throughput import percentile
from dataplane.core.validity import TermGate
from dataplane.ledger import LedgerReader
from dataplane.submit import Submitter
from idl.errors import OutriderError, PlatformFaultError
from idl.ids import QueueName
from idl.jobs import Isolation, JobSpec, Resources
from idl.ledger import LedgerEntry, TermStarted
from idl.settings import ClusterSettings
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.readiness import ask_ready

QUEUE: Final = QueueName("default")
REAL_JOBS_PER_S: Final = 5
REPEATS_PER_S: Final = 200
SETTLE_S: Final = 0.7
"""Between two faults, after the member is back: elections and hints have come to rest."""
WAIT_S: Final = 30.0
HEARTBEAT_S: Final = 0.1
SLOW_MS: Final = {signal.SIGKILL: 100.0, signal.SIGSTOP: 600.0}
"""Beyond what is wanted: such a fault is told at once, and its cluster's logs are kept."""


class Watcher:
    """An outside reader of the ledger: judges validity itself, notes when decisions arrive."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._gate = TermGate()
        self._changed = threading.Condition()
        self.leader = ""
        self.term = 0
        self.why: list[str] = []
        """Of every term, in order."""
        self._first_ms: dict[int, float] = {}
        self._reader = LedgerReader(settings.kafka, settings.pool, 0, self._take)
        self._reader.start()

    def _take(self, batch: list[tuple[int, LedgerEntry]]) -> None:
        now = time.monotonic() * 1000
        with self._changed:
            for offset, entry in batch:
                if not self._gate.judge(offset, entry).valid:
                    continue
                self.leader, self.term = entry.leader, entry.term
                if isinstance(entry.decisions[0], TermStarted):
                    self.why.append(f"term {entry.term}: {entry.decisions[0].why}")
                else:
                    self._first_ms.setdefault(entry.term, now)
            self._changed.notify_all()
        self._reader.done(len(batch))

    def next_decision_after(self, term: int) -> float:
        """Monotonic ms of the first decision of a term above `term`. Raises PlatformFaultError."""
        deadline = time.monotonic() + WAIT_S
        with self._changed:
            while not any(found > term for found in self._first_ms):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise PlatformFaultError(f"nobody decided within {WAIT_S:.0f} s")
            return min(ms for found, ms in self._first_ms.items() if found > term)

    def close(self) -> None:
        """Stops reading."""
        self._reader.close()


class Load:
    """Submits until closed: real jobs, and repeats of an id that is taken."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        submitter = Submitter(self._settings.kafka)
        require = () if os.geteuid() else Isolation().require
        shape = {
            "resources": Resources(cpu_millis=200, memory_bytes=16 << 20),
            "isolation": Isolation(require=require),
        }
        count = 0
        while not self._closed.wait(1 / REPEATS_PER_S):
            count += 1
            real = count % (REPEATS_PER_S // REAL_JOBS_PER_S) == 0
            name = f"load-{count}" if real else "load-repeated"
            spec = JobSpec(id=name, command=("/bin/true",), **shape)  # type: ignore[arg-type] # two Structs by name
            submitter.submit_sync(QUEUE, spec)
        submitter.close()

    def close(self) -> None:
        """Stops."""
        self._closed.set()
        self._thread.join()


def _until_ready(cluster: LocalCluster, name: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ask_ready(cluster.run.process(name).metrics_port)[0]:
        if time.monotonic() > deadline:
            raise PlatformFaultError(f"{name} did not come back")
        time.sleep(0.05)


def outrider(
    broker: str, fault: signal.Signals, times: int, block: int, rng: random.Random, console: Console
) -> list[float]:
    """ms per fault, over as many fresh clusters as it takes. Raises OutriderError."""
    found: list[float] = []
    while len(found) < times:
        found += _one_cluster(broker, fault, min(block, times - len(found)), rng, console)
        console.print(f"{broker} {fault.name}: {len(found)} of {times}")
    return found


def _one_cluster(
    broker: str, fault: signal.Signals, times: int, rng: random.Random, console: Console
) -> list[float]:
    options = LocalOptions(
        name=f"failover-{os.getpid()}", kafka=broker,
        folder=Path(tempfile.mkdtemp(prefix="outrider-failover-")),
    )  # fmt: skip
    found: list[float] = []
    with LocalCluster.start(options) as cluster:
        watcher, load = Watcher(cluster.settings), Load(cluster.settings)
        try:
            time.sleep(3)
            for _ in range(times):
                time.sleep(SETTLE_S + rng.random() * HEARTBEAT_S)
                found.append(_fail_leader(cluster, watcher, fault))
                if found[-1] > SLOW_MS[fault]:
                    at = time.strftime("%H:%M:%S")
                    console.print(f"slow: {found[-1]:.0f} ms at {at}, logs in {options.folder}")
        finally:
            load.close()
            watcher.close()
    if max(found) <= SLOW_MS[fault]:
        LocalCluster.purge(cluster.place)
    return found


def _fail_leader(cluster: LocalCluster, watcher: Watcher, fault: signal.Signals) -> float:
    """ms until the next leader's first decision; then the failed one is back."""
    leader, term = watcher.leader, watcher.term
    begun = time.monotonic() * 1000
    cluster.kill(leader, fault)
    took_ms = watcher.next_decision_after(term) - begun
    if fault == signal.SIGSTOP:
        cluster.kill(leader, signal.SIGCONT)
    else:
        cluster.restart(leader)
    _until_ready(cluster, leader)
    return took_ms


def etcd(fault: signal.Signals, times: int, rng: random.Random) -> list[float]:
    """ms per fault of an etcd with its default settings."""
    cluster = Etcd(Path(tempfile.mkdtemp(prefix="outrider-etcd-")))
    try:
        cluster.start()
        found = []
        for _ in range(times):
            time.sleep(SETTLE_S + rng.random() * HEARTBEAT_S)
            found.append(cluster.fail_leader(fault))
        return found
    finally:
        cluster.stop()


class Row(msgspec.Struct, kw_only=True):
    """One system under one fault; ms."""

    system: str
    fault: str
    times: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    samples_ms: list[float]


def row(system: str, fault: signal.Signals, samples: list[float]) -> Row:
    """Summary of one series."""
    return Row(
        system=system, fault=fault.name, times=len(samples), p50_ms=percentile(samples, 0.5),
        p90_ms=percentile(samples, 0.9), p99_ms=percentile(samples, 0.99), max_ms=max(samples),
        samples_ms=[round(value, 1) for value in samples],
    )  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """Cumulative distributions, logarithmic in time (needs matplotlib: the `bench` extra)."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for one in rows:
        ordered = sorted(one.samples_ms)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=f"{one.system}, {one.fault}")
    axes.set_xscale("log")
    axes.set_xlabel("ms from the fault to the next valid decision (etcd: accepted write)")
    axes.set_ylabel("share of faults")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Prints a table, or JSON; `--plot FILE` draws it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pauses", type=int, default=100)
    parser.add_argument(
        "--etcd", type=int, default=20, help="faults of each kind for etcd; 0: none"
    )
    parser.add_argument("--block", type=int, default=25, help="faults per cluster")
    parser.add_argument("--brokers", default="embedded,apache")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    console, rng = Console(stderr=True), random.Random(options.seed)
    rows: list[Row] = []
    try:
        for fault, times in ((signal.SIGKILL, options.kills), (signal.SIGSTOP, options.pauses)):
            for broker in options.brokers.split(","):
                if times:
                    samples = outrider(broker, fault, times, options.block, rng, console)
                    rows.append(row(f"outrider on {broker}", fault, samples))
            if options.etcd:
                rows.append(row("etcd 3.5", fault, etcd(fault, options.etcd, rng)))
    except OutriderError as error:
        sys.stderr.write(f"failover: {error}\n")
        return 1
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        print(msgspec.json.encode(rows).decode())
    table = Table(title=f"ms from fault to next decision, {os.cpu_count()} CPUs, under load")
    for column in ("system", "fault", "times", "p50", "p90", "p99", "max"):
        table.add_column(column)
    for one in rows:
        table.add_row(one.system, one.fault, str(one.times), f"{one.p50_ms:.0f}",
                      f"{one.p90_ms:.0f}", f"{one.p99_ms:.0f}", f"{one.max_ms:.0f}")  # fmt: skip
    (console if options.json else Console()).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
