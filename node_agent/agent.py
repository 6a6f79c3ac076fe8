"""The node agent process: the one driver of the agent's core. Intents in, attempts run.

Nothing is decided here: `node_agent.core` does; this file reads clocks and DDS, runs attempts
through `node_agent.runner`, and says what happened.
"""

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dataplane.crew import Crew
from dataplane.kafka import check_reachable
from dataplane.payloads import PayloadFetcher
from dataplane.process import (
    Readiness,
    configure_logging,
    new_incarnation,
    now_ms,
    run_process,
    serve_metrics,
)
from dataplane.producer import RecordProducer
from idl.control import ControlBody, Intent, NodeReport
from idl.dds import topics
from idl.dds.link import ControlLink
from idl.errors import ConfigError, OutriderError, PlatformFaultError
from idl.ids import Incarnation, is_valid_name
from idl.records import AttemptResult
from idl.settings import ClusterSettings, load_cluster
from idl.units import parse_bytes, parse_cpu_millis
from node_agent.core.attempts import (
    AgentCore,
    Effect,
    Event,
    HeartbeatDue,
    IntentReceived,
    KillAttempt,
    RefuseAttempt,
    RunAttempt,
    SendStatus,
)
from node_agent.metrics import Metrics
from node_agent.report import Offer, build_report, gpu_devices
from node_agent.runner import AttemptRunner
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings, interpreter_paths
from node_agent.topology.node import NodeTopology, read_topology

STOP_GRACE_S: Final = 5.0
"""After SIGTERM, how long the results of killed attempts may take to reach Kafka."""

log = logging.getLogger("agent")


class Agent:
    """One node. Construct with a running sandbox, then `run`."""

    def __init__(
        self,
        settings: ClusterSettings,
        name: str,
        offer: Offer,
        sandbox: NativeSandbox,
        topology: NodeTopology,
        readiness: Readiness,
    ) -> None:
        self._settings = settings
        self._sandbox = sandbox
        self._gpus = gpu_devices(topology)
        self._readiness = readiness
        self._incarnation = Incarnation(new_incarnation())
        self._report = build_report(
            settings.pool,
            name,
            self._incarnation,
            offer,
            sandbox.enforcement,
            topology,
        )
        self._core = AgentCore(
            settings.pool,
            name,
            self._incarnation,
            self._report.capacity,
            frozenset(self._report.enforces),
        )
        self._metrics = Metrics(name, settings.pool)
        self._flush_due = False
        self._link = ControlLink(
            settings,
            name,
            self._incarnation,
            own_port=0,
            reads=(topics.INTENT,),
            writes=(topics.ATTEMPT_STATUS, topics.NODE_REPORT),
            receive=self._hear,
            now_ms=now_ms,
            only_key=name,
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping`. Raises OutriderError where the process cannot go on."""
        loop = asyncio.get_running_loop()
        self._crew = Crew()
        self._attempts = Crew()
        kafka = self._settings.kafka
        await loop.run_in_executor(None, check_reachable, kafka)
        self._producer = RecordProducer(kafka, name="agent")
        self._fetcher = PayloadFetcher(kafka)
        self._runner = AttemptRunner(
            kafka,
            self._report.node,
            self._sandbox,
            self._gpus,
            self._producer,
            self._fetcher,
            self._tell,
            self._attempt_ended,
        )
        self._link.start()
        self._crew.spawn(self._repeat(self._settings.nodes.heartbeat_ms, self._heartbeat))
        self._crew.spawn(self._repeat(self._settings.nodes.report_ms, self._send_report))
        self._readiness.have("intents")
        log.info("ready", extra={"enforces": self._report.enforces, "gpus": self._report.gpu_note})
        try:
            self._crew.spawn(self._attempts.until(stopping))
            await self._crew.until(stopping)
            await self._stop_attempts()
        finally:
            await self._close()

    async def _stop_attempts(self) -> None:
        live = self._core.live
        log.info("stopping", extra={"attempts": len(live)})
        for assign in live:
            await self._runner.kill(assign.job, assign.attempt, "agent is stopping")
        late = await self._attempts.finish(STOP_GRACE_S)
        if late:
            log.error("results not delivered before the stop", extra={"count": late})

    async def _close(self) -> None:
        self._attempts.cancel()
        self._crew.cancel()
        self._link.close()
        await self._fetcher.aclose()
        await self._producer.aclose()

    # --- facts in, orders out -----------------------------------------------------------------

    def _hear(self, bodies: list[ControlBody]) -> None:
        for body in bodies:
            if isinstance(body, Intent):
                self._tell(IntentReceived(body))

    def _tell(self, event: Event) -> None:
        try:
            for effect in self._core.step(event):
                self._perform(effect)
        except OutriderError as error:
            self._crew.fail(error)
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """One status for everything that happened in this turn of the loop."""
        self._flush_due = False
        for effect in self._core.flush():
            self._perform(effect)
        self._metrics.observe(len(self._core.live), self._link.counts(), self._core.refused_intents)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case RunAttempt(assign=assign, term=term):
                self._attempts.spawn(self._runner.run(assign, term))
            case RefuseAttempt(assign=assign, term=term, detail=detail):
                self._attempts.spawn(self._runner.refuse(assign, term, detail))
            case KillAttempt(job=job, attempt=attempt, why=why):
                self._attempts.spawn(self._runner.kill(job, attempt, why))
            case SendStatus(status=status):
                self._link.send(topics.ATTEMPT_STATUS, status, status.term)

    def _heartbeat(self) -> None:
        self._tell(HeartbeatDue())

    def _send_report(self) -> None:
        self._link.send(topics.NODE_REPORT, self._report)

    def _attempt_ended(self, result: AttemptResult) -> None:
        self._metrics.ended(result)
        log.info(
            "attempt ended",
            extra={"job": result.job, "attempt": result.attempt, "outcome": result.outcome},
        )

    async def _repeat(self, period_ms: int, act: Callable[[], None]) -> None:
        while True:
            act()
            await asyncio.sleep(period_ms / 1000)

    @property
    def report(self) -> NodeReport:
        """What this node says of itself."""
        return self._report


def sandbox_settings(
    settings: ClusterSettings, node: str, devices: tuple[str, ...]
) -> SandboxSettings:
    """This agent's sandboxes: jobs may also run the interpreter that runs the agent."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{settings.cluster}-{node}")
    return SandboxSettings(instance=name, extra_ro_paths=interpreter_paths(), devices=devices)


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(labels) or any("=" not in pair for pair in pairs):
        raise ConfigError("--label must be written KEY=VALUE")
    return labels


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="outrider-agent", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="cluster file")
    parser.add_argument("--name", required=True, help="name of this node")
    parser.add_argument("--cpu", default="", help="CPUs to offer (default: all), e.g. 2 or 500m")
    parser.add_argument("--memory", default="", help="memory to offer (default: most), e.g. 4Gi")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--metrics-address", default="127.0.0.1")
    parser.add_argument("--metrics-port", type=int, default=0, help="0: no /metrics, no /ready")
    parser.add_argument("--log-level", default="INFO")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 stopped, 1 platform fault, 2 configuration."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    configure_logging(options.name, options.log_level)

    async def serve(stopping: asyncio.Event) -> None:
        if not is_valid_name(options.name):
            raise ConfigError(f"--name {options.name!r} is not a valid node name")
        settings = load_cluster(options.config, os.environ)
        offer = Offer(
            cpu_millis=parse_cpu_millis(options.cpu) if options.cpu else 0,
            memory_bytes=parse_bytes(options.memory) if options.memory else 0,
            labels=_labels(options.label),
        )
        readiness = Readiness({"intents"})
        stop_metrics = None
        if options.metrics_port:
            stop_metrics = serve_metrics(options.metrics_address, options.metrics_port, readiness)
        try:
            topology = read_topology()
            devices = gpu_devices(topology).paths
            sandbox = await NativeSandbox.start(sandbox_settings(settings, options.name, devices))
        except SandboxUnavailable as error:
            raise PlatformFaultError(str(error)) from error
        try:
            for limit, why in sandbox.enforcement.missing.items():
                log.warning("limit not enforced", extra={"limit": limit, "reason": why})
            await Agent(settings, options.name, offer, sandbox, topology, readiness).run(stopping)
        finally:
            await sandbox.close()
            if stop_metrics is not None:
                stop_metrics()

    return run_process("outrider-agent", serve)


if __name__ == "__main__":
    sys.exit(main())
