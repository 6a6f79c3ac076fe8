"""Many agents on DDS: 1,000 simulated nodes, each a real Cyclone participant with signed messages
and the real agent core, in a few processes, against 3 real coordinators and a real ledger.

Each node reports and heartbeats as an agent does; attempts end at once (no sandbox: this measures
the control network, not isolation). Figures: time until the leader has all nodes in its ledger, CPU
and memory of the coordinators at rest, and jobs per second through assign, status and result.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from dataplane.crew import Crew
from dataplane.process import monotonic_ms, new_incarnation, now_ms
from dataplane.producer import RecordProducer
from dataplane.results import write_result
from idl.control import ControlBody, Intent, NodeReport
from idl.dds import topics
from idl.dds.bus import LocalDomain
from idl.dds.domain import domain_xml
from idl.dds.link import ControlLink
from idl.dds.peers import PeerAddresses
from idl.errors import OutriderError, PlatformFaultError
from idl.ids import Incarnation
from idl.ledger import Capacity
from idl.records import AttemptResult
from idl.settings import ClusterSettings, load_cluster
from node_agent.core.attempts import (
    AgentCore,
    AttemptEnded,
    Effect,
    Event,
    HeartbeatDue,
    IntentReceived,
    ResultDelivered,
    RunAttempt,
    SendStatus,
)
from outrider.client.client import Client
from outrider.client.job import ALL_LIMITS, Job
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions

AGENTS: Final = 1_000
PROCESSES: Final = 10
JOBS: Final = 2_000
JOIN_S: Final = 180.0
REST_S: Final = 15.0


class SimulatedNode:
    """The real core and the real link; attempts end as soon as they start."""

    def __init__(
        self, settings: ClusterSettings, name: str, domain: LocalDomain, producer: RecordProducer
    ) -> None:
        incarnation = Incarnation(new_incarnation())
        capacity = Capacity(cpu_millis=2_000, memory_bytes=4 << 30)
        self._settings, self._producer, self._crew = settings, producer, Crew()
        self._core = AgentCore(settings.pool, name, incarnation, capacity, frozenset(ALL_LIMITS))
        self._report = NodeReport(
            pool=settings.pool, node=name, incarnation=incarnation, capacity=capacity,
            enforces=ALL_LIMITS, simulated=True,
        )  # fmt: skip
        self._link = ControlLink(
            settings, name, incarnation, own_port=0, reads=(topics.INTENT,),
            writes=(topics.ATTEMPT_STATUS, topics.NODE_REPORT), receive=self._hear, now_ms=now_ms,
            only_key=name, domain=domain,
        )  # fmt: skip
        self._link.start()

    def _hear(self, bodies: list[ControlBody]) -> None:
        for body in bodies:
            if isinstance(body, Intent):
                self._tell(IntentReceived(body))

    def _tell(self, event: Event) -> None:
        for effect in (*self._core.step(event, monotonic_ms()), *self._core.flush()):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, SendStatus):
            status = effect.status
            self._link.send(topics.ATTEMPT_STATUS, status, status.term, to=effect.to)
        elif isinstance(effect, RunAttempt):
            self._crew.spawn(self._finish(effect))

    async def _finish(self, run: RunAttempt) -> None:
        job, attempt = run.assign.job, run.assign.attempt
        self._tell(AttemptEnded(job, attempt))
        result = AttemptResult(
            job=job, attempt=attempt, node=self._report.node, term=run.term, outcome="succeeded",
            exit_code=0, started_ms=now_ms(), ended_ms=now_ms(),
        )  # fmt: skip
        await write_result(self._producer, self._settings.kafka, result)
        self._tell(ResultDelivered(job, attempt))

    async def beat(self, delay_s: float) -> None:
        """Heartbeats and reports as an agent's, spread over the period."""
        await asyncio.sleep(delay_s)
        timing, count = self._settings.nodes, 0
        every = max(1, timing.report_ms // timing.heartbeat_ms)
        while True:
            if count % every == 0:
                self._link.send(topics.NODE_REPORT, self._report)
            self._tell(HeartbeatDue())
            count += 1
            await asyncio.sleep(timing.heartbeat_ms / 1000)


async def simulate(config: Path, first: int, count: int) -> None:
    """One process of `count` nodes, until it is ended."""
    settings = load_cluster(config, os.environ)
    domain = LocalDomain(
        domain_xml(settings.dds, PeerAddresses().look_up(settings.coordinators), 0)
    )
    producer = RecordProducer(settings.kafka, name="simulated")
    period_s = settings.nodes.heartbeat_ms / 1000
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            node = SimulatedNode(settings, f"sim-{first + index:04d}", domain, producer)
            group.create_task(node.beat(period_s * index / count))


def _usage(pid: int) -> tuple[float, int]:
    """(CPU seconds, resident bytes) of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (int(fields[11]) + int(fields[12])) / ticks, pages * os.sysconf("SC_PAGE_SIZE")


def _coordinators(cluster: LocalCluster) -> dict[str, int]:
    return {
        p.name: p.identity.pid
        for p in cluster.processes
        if p.role == "coordinator" and p.identity is not None
    }


def _until_joined(cluster: LocalCluster, wanted: int, console: Console) -> float:
    begun, view = time.monotonic(), LedgerView(cluster.settings)
    while True:
        view.advance()
        joined = sum(1 for name in view.state.nodes if name.startswith("sim-"))
        if joined >= wanted:
            return time.monotonic() - begun
        if time.monotonic() - begun > JOIN_S:
            raise PlatformFaultError(f"only {joined} of {wanted} nodes joined in {JOIN_S:.0f} s")
        console.print(f"{joined} of {wanted} nodes joined")
        time.sleep(2)


def _jobs_per_s(cluster: LocalCluster, jobs: int) -> float:
    with Client(cluster.config_path) as client:
        begun = time.monotonic()
        handles = client.submit(
            [Job(("/bin/true",), id=f"scale-{i}", cpu="2", memory="1Gi") for i in range(jobs)]
        )
        for handle in handles:
            handle.wait(300)
        return jobs / (time.monotonic() - begun)


def measure(
    agents: int, processes: int, jobs: int, broker: str, console: Console
) -> dict[str, Any]:
    """All figures. Raises OutriderError."""
    options = LocalOptions(
        name=f"scale-{os.getpid()}", folder=Path(tempfile.mkdtemp(prefix="outrider-scale-")),
        kafka=broker, agents=1,
    )  # fmt: skip
    share = agents // processes
    with LocalCluster.start(options) as cluster:
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.dds_scale", "--simulate",
                 str(cluster.config_path), "--first", str(index * share), "--count", str(share)]
            )
            for index in range(processes)
        ]  # fmt: skip
        try:
            joined_s = _until_joined(cluster, share * processes, console)
            time.sleep(5)
            pids = _coordinators(cluster)
            before = {name: _usage(pid) for name, pid in pids.items()}
            time.sleep(REST_S)
            after = {name: _usage(pid) for name, pid in pids.items()}
            rate = _jobs_per_s(cluster, jobs)
            view = LedgerView(cluster.settings)
            view.advance()
        finally:
            for process in nodes:
                process.kill()
                process.wait()
    LocalCluster.purge(cluster.place)
    return {
        "agents": share * processes,
        "joined_s": round(joined_s, 1),
        "rest_cpu_percent": {
            name: round((after[name][0] - before[name][0]) / REST_S * 100, 1) for name in pids
        },
        "resident_mb": {name: round(after[name][1] / 2**20) for name in pids},
        "jobs_per_s": round(rate, 1),
        "nodes_lost": sum(1 for name in view.state.nodes.values() if name.lost),
        "terms": view.state.term,
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the figures, as a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dds_scale", description=__doc__)
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--kafka", default="embedded")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--simulate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.simulate:
        asyncio.run(simulate(options.simulate, options.first, options.count))
        return 0
    console = Console(stderr=True)
    try:
        found = measure(options.agents, options.processes, options.jobs, options.kafka, console)
    except OutriderError as error:
        sys.stderr.write(f"dds_scale: {error}\n")
        return 1
    if options.json:
        print(json.dumps(msgspec.to_builtins(found)))
        return 0
    table = Table(title=f"{found['agents']} agents, 3 coordinators, {os.cpu_count()} CPUs")
    table.add_column("figure")
    table.add_column("value")
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
