"""`/bin/true` end to end: jobs per second, and submit → running, on both brokers in one run.

Each broker gets a fresh local cluster (3 coordinators, 2 agents). Two workloads: a *burst* (all
jobs at once: throughput) and a *trickle* (one job at a time, the next when it ended: latency
without queueing). Times are those of the records: `submitted_ms` of the job, `started_ms` of its
result (same clock: one machine).

`--profile` adds the CPU time per job of every kind of process during the burst, and where their
Python spends it (`benchmarks.costs`); sampling itself costs a few per cent.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.costs import Costs, Meter, show
from dataplane.sampling import FOLDER_VARIABLE
from dataplane.tail import scan
from idl.codec import decode, decode_spec
from idl.errors import OutriderError
from idl.jobs import LimitName
from idl.records import AttemptResult
from idl.settings import ClusterSettings
from idl.topics import TopicNames
from outrider.client.client import Client
from outrider.client.job import Job
from outrider.local.cluster import LocalCluster, LocalOptions

BURST_JOBS: Final = 1000
TRICKLE_JOBS: Final = 50
WAIT_S: Final = 300.0
NODE_CPU_MILLIS: Final = 8_000
"""Each agent offers more CPUs than there are: a job of half a CPU is not slowed by its own quota
(10 ms per 100 ms at 100m would be used up by the sandbox's set-up), and 16 run at once."""


class Figures(msgspec.Struct, kw_only=True):
    """One broker's figures; times in ms."""

    broker: str
    jobs: int
    burst_jobs_per_s: float
    burst_to_running_p50_ms: float
    burst_to_running_p99_ms: float
    trickle_to_running_p50_ms: float
    trickle_to_running_p99_ms: float
    trickle_to_result_p50_ms: float
    costs: Costs | None = None
    """CPU per job of the burst."""


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _true(job: str, unenforced: tuple[LimitName, ...]) -> Job:
    return Job(("/bin/true",), id=job, cpu="500m", memory="16Mi", allow_unenforced=unenforced)


def _started(settings: ClusterSettings) -> dict[str, float]:
    """Job → ms from submission to the start of its first attempt."""
    names = TopicNames(settings.kafka.prefix)
    submitted = {}
    for queue in settings.queues:
        for record in scan(settings.kafka, names.queue(queue)):
            spec = decode_spec(record.value, record.content_type)
            submitted[spec.id] = spec.submitted_ms
    delays: dict[str, float] = {}
    for record in scan(settings.kafka, names.results):
        result = decode(record.value, AttemptResult)
        if result.attempt == 1 and result.outcome == "succeeded":
            delays[result.job] = result.started_ms - submitted[result.job]
    return delays


def _options(broker: str, samples: Path | None) -> LocalOptions:
    return LocalOptions(
        name=f"bench-{os.getpid()}", folder=Path(tempfile.mkdtemp(prefix="outrider-bench-")),
        kafka=broker, node_cpu_millis=NODE_CPU_MILLIS, overcommit=True,
        env={} if samples is None else {FOLDER_VARIABLE: str(samples)},
    )  # fmt: skip


def _trickle(client: Client, unenforced: tuple[LimitName, ...]) -> list[float]:
    """Round trips in ms, from before `submit` to the end known to the client."""
    round_trips = []
    for index in range(TRICKLE_JOBS):
        begun = time.monotonic()
        client.submit(_true(f"trickle-{index}", unenforced)).wait(WAIT_S)
        round_trips.append((time.monotonic() - begun) * 1000)
    return round_trips


def _burst(client: Client, jobs: int, unenforced: tuple[LimitName, ...]) -> float:
    """Seconds from the first submission to the last end known to the client."""
    begun = time.monotonic()
    handles = client.submit([_true(f"burst-{i}", unenforced) for i in range(jobs)])
    for handle in handles:
        handle.wait(WAIT_S)
    return time.monotonic() - begun


def measure(broker: str, jobs: int, console: Console, samples: Path | None = None) -> Figures:
    """Figures of one broker; with `samples`, a folder, its costs too. Raises OutriderError."""
    say = console.print
    unenforced: tuple[LimitName, ...] = () if os.geteuid() == 0 else ("memory", "cpu", "pids")
    costs = None
    with LocalCluster.start(
        _options(broker, samples), lambda line: say(f"[dim]{broker}: {line}[/dim]")
    ) as cluster:
        with Client(cluster.config_path) as client:
            client.submit(_true("warm", unenforced)).wait(WAIT_S)
            say(f"{broker}: trickle of {TRICKLE_JOBS}")
            round_trips = _trickle(client, unenforced)
            meter = None if samples is None else Meter(cluster, samples)
            say(f"{broker}: burst of {jobs}")
            if meter is not None:
                meter.start()
            wall = _burst(client, jobs, unenforced)
            if meter is not None:
                costs = meter.stop(jobs)
        delays = _started(cluster.settings)
        burst = [delay for job, delay in delays.items() if job.startswith("burst-")]
        trickle = [delay for job, delay in delays.items() if job.startswith("trickle-")]
    LocalCluster.purge(cluster.place)
    return Figures(
        broker=broker,
        jobs=jobs,
        burst_jobs_per_s=jobs / wall,
        burst_to_running_p50_ms=percentile(burst, 0.5),
        burst_to_running_p99_ms=percentile(burst, 0.99),
        trickle_to_running_p50_ms=percentile(trickle, 0.5),
        trickle_to_running_p99_ms=percentile(trickle, 0.99),
        trickle_to_result_p50_ms=statistics.median(round_trips),
        costs=costs,
    )


def main(argv: list[str] | None = None) -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--jobs", type=int, default=BURST_JOBS)
    parser.add_argument("--brokers", default="embedded,apache")
    parser.add_argument("--profile", action="store_true", help="CPU per job and process too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    found: list[Figures] = []
    try:
        for name in options.brokers.split(","):
            with tempfile.TemporaryDirectory(prefix="outrider-samples-") as folder:
                samples = Path(folder) if options.profile else None
                found.append(measure(name, options.jobs, console, samples))
    except OutriderError as error:
        sys.stderr.write(f"throughput: {error}\n")
        return 1
    if options.json:
        print(msgspec.json.encode(found).decode())
        return 0
    table = Table(title=f"/bin/true, {os.cpu_count()} CPUs, 3 coordinators, 2 agents")
    table.add_column("figure")
    for figures in found:
        table.add_column(figures.broker, justify="right")
    for field in Figures.__struct_fields__[2:-1]:
        table.add_row(field, *(f"{getattr(figures, field):.1f}" for figures in found))
    out = Console()
    out.print(table)
    for figures in found:
        if figures.costs is not None:
            out.print(f"\n{figures.broker}")
            show(figures.costs, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
