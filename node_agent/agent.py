"""The node agent process: the one driver of the agent's core. Intents in, attempts run.

Nothing is decided here: `node_agent.core` does; this file reads clocks and DDS, runs attempts
through `node_agent.runner`, and says what happened. What must outlive the process is in its state
directory: a journal, and the launcher that runs the jobs (ADR 0006).
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from dataplane.crew import Crew
from dataplane.kafka import check_reachable
from dataplane.patience import Patience
from dataplane.payloads import PayloadFetcher
from dataplane.process import (
    Readiness,
    configure_logging,
    monotonic_ms,
    new_incarnation,
    now_ms,
    run_process,
    serve_metrics,
)
from dataplane.producer import RecordProducer
from idl.control import ControlBody, Intent, NodeReport
from idl.dds import topics
from idl.dds.link import ControlLink
from idl.errors import ConfigError, OutriderError
from idl.ids import Incarnation, is_valid_name
from idl.jobs import HOST_NETWORK_LABEL
from idl.members import merged
from idl.records import AttemptResult
from idl.settings import ClusterSettings, load_cluster
from idl.units import parse_bytes, parse_cpu_millis
from node_agent.cdi import CDI_DIRS, CdiDevices, read_cdi
from node_agent.core.attempts import (
    AgentCore,
    AttemptRunning,
    Effect,
    EndLease,
    Event,
    ExtendLease,
    FollowMembers,
    ForgetAttempt,
    HeartbeatDue,
    IntentReceived,
    KillAttempt,
    LeaseDue,
    RefuseAttempt,
    RunAttempt,
    SendStatus,
)
from node_agent.core.gpus import GpuDevices
from node_agent.core.journal import Accepted, Forgotten, Leased, Record, TermSeen
from node_agent.core.pace import StatusPace
from node_agent.core.recovery import (
    AdoptAttempt,
    DeliverAgain,
    Recovery,
    RecoveryEffect,
    recover,
)
from node_agent.images.bounds import IMAGE_FILES_MAX
from node_agent.kept import Kept, open_kept
from node_agent.launcher import rights
from node_agent.lease_timer import LeaseTimer
from node_agent.metrics import Metrics
from node_agent.pressure import node_pressure
from node_agent.report import (
    Offer,
    build_report,
    gpu_devices,
    offered,
    with_devices,
    with_health,
)
from node_agent.room import Room
from node_agent.runner import AttemptRunner, RunnerPorts
from node_agent.sandbox.settings import BACKENDS, ORPHAN_GRACE_S
from node_agent.state import boot_ms
from node_agent.topology.described import load_profile, read_described
from node_agent.topology.health import HealthWatch
from node_agent.topology.node import NodeTopology, read_topology
from node_agent.topology.nvml import connect_nvml

STOP_GRACE_S: Final = 5.0
"""After SIGTERM, how long the results of killed attempts may take to reach Kafka."""

GPU_HEALTH_S: Final = 10.0
"""Between looks at the GPUs: ten cheap questions each, and whatever events the driver has."""

log = logging.getLogger("agent")


class Agent:
    """One node. Construct with its state and a running launcher, then `run`."""

    def __init__(
        self,
        settings: ClusterSettings,
        name: str,
        offer: Offer,
        topology: NodeTopology,
        readiness: Readiness,
        kept: Kept,
        devices: GpuDevices,
    ) -> None:
        self._settings = settings
        self._kept = kept
        self._keeper, self._journal = kept.keeper, kept.journal
        self._gpus, self._images = devices, kept.images
        self._room = Room(kept.state.path)
        self._readiness = readiness
        incarnation = kept.journal.incarnation
        self._report = build_report(
            settings.pool,
            name,
            incarnation,
            offer,
            self._keeper.current.enforcement,
            topology,
            with_devices(offered(topology, offer), devices),
            self._images.offered(self._keeper.current.enforcement),
        )
        self._core = AgentCore(
            settings.pool,
            name,
            incarnation,
            self._report.capacity,
            frozenset(self._report.enforces),
        )
        self._metrics = Metrics(name, settings.pool)
        self._pace = StatusPace()
        self._flushing: asyncio.TimerHandle | None = None
        self._leases = LeaseTimer(lambda: self._tell(LeaseDue()))
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._link = ControlLink(
            settings,
            name,
            Incarnation(new_incarnation()),  # of this process: what guards against replays
            own_port=0,
            reads=(topics.INTENT,),
            writes=(topics.ATTEMPT_STATUS, topics.NODE_REPORT),
            receive=self._hear,
            now_ms=now_ms,
            only_key=name,
        )

    async def run(self, stopping: asyncio.Event, leave_jobs: Callable[[], bool]) -> None:
        """Runs until `stopping`; then jobs are killed, or left to the next process of this agent.

        Raises OutriderError where the process cannot go on; jobs are left then, too.
        """
        self._crew = Crew()
        self._attempts = Crew()
        leaving = True
        try:
            await self._begin(stopping)
            self._crew.spawn(self._attempts.until(stopping))
            await self._crew.until(stopping)
            leaving = leave_jobs()
            if not leaving:
                await self._stop_attempts()
        finally:
            await self._close(leaving)

    async def _begin(self, stopping: asyncio.Event) -> None:
        kafka = self._settings.kafka
        recovery = recover(self._journal.state, self._keeper.current.found, self._kept.adopted)
        if not recovery.effects:  # else jobs of ours run, and Kafka may be away for long
            patiently = Patience(kafka, self._readiness, stopping)
            await patiently(lambda: asyncio.to_thread(check_reachable, kafka))
        producer = RecordProducer(kafka, name="agent")
        fetcher = PayloadFetcher(kafka)
        self._closers += [fetcher.aclose, producer.aclose]
        ports = RunnerPorts(
            keeper=self._keeper,
            gpus=self._gpus,
            images=self._images,
            producer=producer,
            fetcher=fetcher,
            output=self._kept.state.output,
            record=self._record,
            behind=lambda: self._journal.behind,
            entry=lambda job, attempt: self._journal.state.entries[job, attempt],
            tell=self._tell,
            ended=self._attempt_ended,
        )
        self._runner = AttemptRunner(kafka, self._report.node, ports)
        await self._recover(recovery)
        self._link.start()
        self._crew.spawn(self._link.mind_peers())
        self._crew.spawn(self._keeper.watch(self._launcher_restarted))
        self._crew.spawn(self._renew_launcher())
        sweep = not self._kept.adopted
        self._crew.spawn(self._images.unpack(self._take_images, sweep=sweep))
        self._crew.spawn(self._repeat(self._settings.nodes.report_ms, self._mind_disk))
        self._crew.spawn(self._repeat(self._settings.nodes.heartbeat_ms, self._heartbeat))
        self._crew.spawn(self._repeat(self._settings.nodes.report_ms, self._send_report))
        if self._report.topology.gpus and not self._report.simulated:
            self._crew.spawn(self._watch_gpus())
        self._readiness.have("intents")
        log.info("ready", extra={"enforces": self._report.enforces, "gpus": self._gpu_words()})

    async def _recover(self, recovery: Recovery) -> None:
        """Goes on where the agent's last process was; nothing is heard from the leader before."""
        self._core.restore(recovery.restored, self._journal.state.term)
        adopted = sum(isinstance(effect, AdoptAttempt) for effect in recovery.effects)
        self._metrics.adopted(adopted)
        self._metrics.journal(self._journal.size_bytes)
        for key in recovery.unknown:
            await self._keeper.current.discard(key)
        for effect in recovery.effects:
            self._start(effect)
        log.info(
            "journal read",
            extra={
                "same_incarnation": self._journal.same_incarnation,
                "same_launcher": self._kept.adopted,
                "attempts": len(recovery.restored),
                "adopted": adopted,
                "killed_as_unknown": len(recovery.unknown),
            },
        )

    async def _stop_attempts(self) -> None:
        live = self._core.live
        log.info("stopping", extra={"attempts": len(live)})
        for assign in live:
            await self._runner.kill(assign.job, assign.attempt, "agent is stopping")
        late = await self._attempts.finish(STOP_GRACE_S)
        if late:
            log.warning("results wait for the agent's next start", extra={"count": late})

    async def _close(self, leaving: bool) -> None:
        self._leases.cancel()
        if leaving:  # before anything is cancelled: a run that is cancelled is killed
            await self._keeper.leave()
        self._attempts.cancel()
        self._crew.cancel()
        if self._flushing is not None:
            self._flushing.cancel()
        self._link.close()
        for close in self._closers:
            await close()

    # --- facts in, orders out -----------------------------------------------------------------

    def _hear(self, bodies: list[ControlBody]) -> None:
        for body in bodies:
            if isinstance(body, Intent):
                self._tell(IntentReceived(body))

    def _tell(self, event: Event) -> None:
        try:
            effects = self._core.step(event, boot_ms())
            if self._core.term > self._journal.state.term:
                self._record(TermSeen(term=self._core.term))
            for effect in effects:
                self._perform(effect)
        except OutriderError as error:
            self._crew.fail(error)
        self._leases.watch(self._core.next_lease_end_ms)
        if self._core.has_news:
            self._plan_flush(urgent=isinstance(event, AttemptRunning))

    def _plan_flush(self, *, urgent: bool) -> None:
        now = monotonic_ms()
        due = self._pace.changed(now, urgent=urgent)
        if due is None:
            return
        if self._flushing is not None:
            self._flushing.cancel()
        delay_s = (due - now) / 1000
        self._flushing = asyncio.get_running_loop().call_later(delay_s, self._flush)

    def _flush(self) -> None:
        """One status for everything that happened since the last one."""
        self._flushing = None
        self._pace.sent(monotonic_ms())
        for effect in self._core.flush():
            self._perform(effect)
        self._observe()

    def _observe(self) -> None:
        self._metrics.observe(len(self._core.live), self._link.counts(), self._core.refused_intents)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case ExtendLease(job=job, attempt=attempt, until_ms=until_ms):
                self._record(Leased(job=job, attempt=attempt, until_ms=until_ms))
                self._attempts.spawn(self._runner.extend(job, attempt, until_ms))
            case EndLease(job=job, attempt=attempt):
                self._attempts.spawn(self._runner.end_lease(job, attempt))
            case RunAttempt(assign=assign, term=term) | RefuseAttempt(assign=assign, term=term):
                until_ms = effect.lease_until_ms if isinstance(effect, RunAttempt) else 0
                accepted = Accepted(
                    assign=assign, term=term, at_ms=now_ms(), lease_until_ms=until_ms
                )
                self._record(accepted)
                self._start(effect)
            case KillAttempt(job=job, attempt=attempt, why=why):
                self._attempts.spawn(self._runner.kill(job, attempt, why))
            case ForgetAttempt(job=job, attempt=attempt):
                self._record(Forgotten(job=job, attempt=attempt))
            case FollowMembers(members=members):
                log.info("coordinators changed", extra={"members": [p.name for p in members]})
                self._link.follow(merged(members, self._settings.coordinators))
            case SendStatus(status=status, to=to):
                self._link.send(topics.ATTEMPT_STATUS, status, status.term, to=to)

    def _start(self, effect: RecoveryEffect) -> None:
        """What the journal knows already."""
        match effect:
            case RunAttempt(assign=assign):
                self._attempts.spawn(self._runner.run(assign))
            case RefuseAttempt(assign=assign, detail=detail):
                self._attempts.spawn(self._runner.refuse(assign, detail))
            case AdoptAttempt(assign=assign):
                self._attempts.spawn(self._runner.adopt(assign, self._keeper.current))
            case DeliverAgain(assign=assign):
                self._attempts.spawn(self._runner.deliver_again(assign))

    def _record(self, record: Record) -> bool:
        """Into the journal; False where the disk is full. Any other fault ends the agent."""
        try:
            stored = self._journal.append(record)
        except OutriderError as error:
            self._crew.fail(error)
            raise
        self._metrics.journal(self._journal.size_bytes)
        if not (stored or self._core.closed):
            asyncio.get_running_loop().call_soon(self._mind_disk)
        return stored

    def _mind_disk(self) -> None:
        """Takes no new work while the state directory lacks room, and says why."""
        try:
            reason = self._room.look(self._journal)
        except OutriderError as error:
            self._crew.fail(error)
            return
        self._metrics.disk(self._room.free_bytes, bool(reason))
        if reason != self._core.closed:
            log.warning("draining" if reason else "taking work again", extra={"reason": reason})
            self._core.close(reason)
            self._report = replace(self._report, draining=bool(reason), drain_reason=reason)
            self._send_report()

    def _heartbeat(self) -> None:
        self._tell(HeartbeatDue())
        self._observe()

    def _send_report(self) -> None:
        pressure = node_pressure()
        self._metrics.pressure(pressure)
        report = replace(self._report, pressure=pressure)
        self._link.send(topics.NODE_REPORT, report)

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

    async def _watch_gpus(self) -> None:
        """Takes a GPU that fell ill out of the offer, and back in when it is well again."""
        uuids = tuple(gpu.uuid for gpu in self._report.topology.gpus)
        watch = HealthWatch(connect_nvml, uuids)
        fixed = {gpu.uuid: gpu.unhealthy for gpu in self._report.topology.gpus if gpu.unhealthy}
        loop = asyncio.get_running_loop()
        try:
            while True:
                found = fixed | await loop.run_in_executor(None, watch.look)
                for uuid in uuids:
                    reading = watch.readings.get(uuid)
                    values = {} if reading is None else reading._asdict()
                    self._metrics.gpu(uuid, uuid not in found, values)
                self._take_health(found)
                await asyncio.sleep(GPU_HEALTH_S)
        finally:
            watch.close()

    def _take_health(self, reasons: Mapping[str, str]) -> None:
        report = with_health(self._report, reasons)
        if report == self._report:
            return
        self._report = report
        self._core.offer(report.capacity)
        log.warning("GPUs changed", extra={"gpus": self._gpu_words()})
        self._send_report()

    def _launcher_restarted(self) -> None:
        self._metrics.launcher_restarted()
        self._take_images()

    async def _renew_launcher(self) -> None:
        """One that was adopted goes once it is idle, though no job comes: those that would may wait
        for an image that only a new one has."""
        while self._keeper.current.outdated:
            await self._keeper.refresh()
            await asyncio.sleep(self._settings.nodes.report_ms / 1000)

    def _take_images(self) -> None:
        """Another image can be had, or another launcher has others."""
        images = self._images.offered(self._keeper.current.enforcement)
        if images != self._report.images:
            self._report = replace(self._report, images=images)
            self._send_report()

    def _gpu_words(self) -> str:
        """How many GPUs are offered, or why none is."""
        parts = self._report.topology
        ill = [f"GPU {gpu.index}: {gpu.unhealthy}" for gpu in parts.gpus if gpu.unhealthy]
        return "; ".join([f"{len(self._report.capacity.gpus)} GPUs", *ill]) + (
            f" ({parts.gpu_note})" if parts.gpu_note else ""
        )

    @property
    def report(self) -> NodeReport:
        """What this node says of itself."""
        return self._report


class Leaving:
    """Whether jobs are left running at the stop: SIGHUP says so, or the operator always does."""

    def __init__(self, stopping: asyncio.Event, *, always: bool) -> None:
        self._stopping, self._asked = stopping, always
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)

    def _hang_up(self) -> None:
        self._asked = True
        self._stopping.set()

    def asked(self) -> bool:
        """True where the next process of this agent is to go on with them."""
        return self._asked


def machine_of(profile: str) -> NodeTopology:
    """This machine, or the described one that the node plays. Raises ConfigError."""
    if not profile:
        return read_topology()
    return read_described(load_profile(profile), Path(profile).stem)


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(labels) or any("=" not in pair for pair in pairs):
        raise ConfigError("--label must be written KEY=VALUE")
    return labels


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="outrider-agent", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="cluster file")
    parser.add_argument("--name", required=True, help="name of this node")
    parser.add_argument(
        "--cpu", default="", help="CPUs to offer (default: all we may use), e.g. 2 or 500m"
    )
    parser.add_argument("--memory", default="", help="memory to offer (default: most), e.g. 4Gi")
    parser.add_argument(
        "--gpus", default="", metavar="all|none|K/N|LIST",
        help="GPUs to offer: indices or UUIDs, or the K-th of N equal parts (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--cdi-dir", action="append", default=[], metavar="DIR",
        help="where CDI specs are; repeatable (default: /etc/cdi and /var/run/cdi)",
    )  # fmt: skip
    parser.add_argument(
        "--cpus", default="", metavar="all|none|K/N|LIST",
        help="CPUs that jobs may be pinned to (default: all, or none with a smaller --cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--node-profile", default="", metavar="NAME",
        help="play this machine, simulated: jobs get no device (a name, or a file of yours)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-host-network",
        action="store_true",
        help="let jobs of the profile `network` use this machine's network",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="NAME=dir:/PATH|NAME=oci:/PATH[:REF]",
        help="a root that jobs may ask for: a directory, or an OCI image layout; repeatable",
    )  # fmt: skip
    parser.add_argument("--image-bytes", default="", help="of one image at most (default: 32Gi)")
    parser.add_argument(
        "--image-files", type=int, default=IMAGE_FILES_MAX,
        help=f"entries of one image at most (default: {IMAGE_FILES_MAX})",
    )  # fmt: skip
    runs = "who carries jobs out: our own launcher (default), or a container runtime (as root)"
    parser.add_argument("--sandbox", choices=BACKENDS, default="native", help=runs)
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--state-dir",
        default="",
        help="where nodes keep their state, each in a directory of its name "
        "(default: state_dir of the cluster file, else `state` beside it)",
    )
    parser.add_argument(
        "--keep-jobs-on-stop",
        action="store_true",
        help="SIGTERM leaves running jobs to the next start, as SIGHUP always does",
    )
    parser.add_argument(
        "--orphan-grace",
        default=f"{ORPHAN_GRACE_S:g}s",
        help="how long jobs run on without any agent, then they are killed (default: 600s)",
    )
    parser.add_argument("--metrics-address", default="127.0.0.1")
    parser.add_argument("--metrics-port", type=int, default=0, help="0: no /metrics, no /ready")
    parser.add_argument("--log-level", default="INFO")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 stopped, 1 platform fault, 2 configuration."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    configure_logging(options.name, options.log_level)
    rights.raise_limit()

    async def serve(stopping: asyncio.Event) -> None:
        if not is_valid_name(options.name):
            raise ConfigError(f"--name {options.name!r} is not a valid node name")
        settings = load_cluster(options.config, os.environ)
        offer = Offer(
            cpu_millis=parse_cpu_millis(options.cpu) if options.cpu else 0,
            memory_bytes=parse_bytes(options.memory) if options.memory else 0,
            labels=_labels(options.label)
            | (HOST_NETWORK_LABEL if options.allow_host_network else {}),
            gpus=options.gpus,
            cpus=options.cpus,
            profile=options.node_profile,
        )
        readiness = Readiness({"intents"})
        stop_metrics = None
        if options.metrics_port:
            stop_metrics = serve_metrics(options.metrics_address, options.metrics_port, readiness)
        topology = machine_of(options.node_profile)
        parts = offered(topology, offer)
        folders = [Path(folder) for folder in options.cdi_dir] or CDI_DIRS
        cdi = CdiDevices() if offer.profile else read_cdi(parts, folders)
        devices = gpu_devices(parts, cdi)
        leaving = Leaving(stopping, always=options.keep_jobs_on_stop)
        kept = await open_kept(settings, options, devices.paths, cdi.mounts)
        try:
            for limit, why in kept.keeper.current.enforcement.missing.items():
                log.warning("limit not enforced", extra={"limit": limit, "reason": why})
            agent = Agent(settings, options.name, offer, topology, readiness, kept, devices)
            await agent.run(stopping, leaving.asked)
        finally:
            await kept.close()
            if stop_metrics is not None:
                stop_metrics()

    return run_process("outrider-agent", serve)


if __name__ == "__main__":
    sys.exit(main())
