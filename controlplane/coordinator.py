"""A pool's coordinator: the one driver of the two cores. Events in, effects out.

Nothing is decided here. Election and Coordinator are pure (`controlplane.core`); this file reads
clocks, DDS and Kafka, hands them facts, and performs what they order, in that order.
"""

import argparse
import asyncio
import logging
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from controlplane.core import events as ev
from controlplane.core.catchup import CatchUp
from controlplane.core.coordinator import Coordinator, Role
from controlplane.core.election import Election, Standing
from controlplane.core.membership import Member
from controlplane.core.silence import ElectionTiming
from controlplane.hints import require_alone
from controlplane.intake import Intake, IntakeEvent, Partitions
from controlplane.metrics import Metrics
from controlplane.priority import Timing, choose_timing, raise_priority
from controlplane.process import CoordinatorProcess, check_pools
from controlplane.snapshots import SnapshotKeeper
from dataplane.crew import Crew
from dataplane.dead_letter import fetch_original, write_dead_letter
from dataplane.ledger import LedgerReader, LedgerWriter
from dataplane.patience import Patience
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
from dataplane.read import require_partitions
from dataplane.snapshots import recover
from idl.control import (
    AttemptStatus,
    Ballot,
    BallotReply,
    Beacon,
    ControlBody,
    NodeReport,
)
from idl.dds import topics
from idl.errors import ConfigError, PlatformFaultError
from idl.ids import CoordinatorId, Incarnation, scheduler_role
from idl.ledger import LedgerEntry
from idl.members import Members, merged
from idl.records import DeadLetter
from idl.settings import ClusterSettings, load_cluster
from idl.topics import TopicNames

BACKLOG_EVERY_S: Final = 1.0
"""How often the leader asks Kafka for the ends of the queues (queue depth, metrics)."""
PARTITIONS_S: Final = 5.0
"""For a broker's answer about its topics, at start."""
DEAD_LETTER_RETRY_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 1.0
"""A broker that answers does so in milliseconds."""
NO_MEMBER: Final = "this coordinator is no member (any more): it neither stands nor votes in pool "

log = logging.getLogger("coordinator")


class PoolCoordinator:
    """One pool in one process (`controlplane.process`), which may serve others beside it."""

    def __init__(
        self,
        settings: ClusterSettings,
        name: str,
        incarnation: Incarnation,
        timing: Timing,
        readiness: Readiness,
        process: CoordinatorProcess,
        config: Path | None = None,
    ) -> None:
        """`config`: the cluster file, for the processes that write snapshots; None: none are."""
        self._process, self._link = process, process.link
        self._needs = f"ledger of {settings.pool}"
        readiness.need(self._needs)
        self._settings = settings
        self._own = settings.coordinator(name)
        self._readiness = readiness
        self._config = config
        self._epoch_offset_ms = now_ms() - monotonic_ms()
        self._role = scheduler_role(settings.pool)
        self._election = Election(
            self._role,
            name,
            incarnation,
            tuple(Member(name=p.name, preference=p.preference) for p in settings.coordinators),
            ElectionTiming(heartbeat_ms=timing.heartbeat_ms, timeout_ms=timing.timeout_ms),
            seed=incarnation,
            now_ms=self._now(),
        )
        policies = {str(queue): policy for queue, policy in settings.queues.items()}
        self._core = Coordinator(
            CoordinatorId(name), incarnation, settings.pool, policies, settings.nodes,
            settings.coordinators,
        )  # fmt: skip
        self._metrics = Metrics(name, settings.pool)
        self._work: deque[tuple[str, Any]] = deque()
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None
        self._catch_up = CatchUp()
        self._opened: list[Callable[[], Awaitable[None]]] = []
        self._storing: set[str] = set()
        """Keys of dead letters on their way to Kafka: the core asks again while it waits."""

    @property
    def settings(self) -> ClusterSettings:
        """Its cluster file."""
        return self._settings

    def _now(self) -> int:
        """Epoch ms that never go back within this process (see `controlplane.core.events`)."""
        return self._epoch_offset_ms + monotonic_ms()

    async def open(self, crew: Crew, stopping: asyncio.Event) -> None:
        """Reads its ledger up to where it ends now, from the newest snapshot; waits for Kafka until
        `stopping`. Raises OutriderError where the process cannot go on."""
        loop = asyncio.get_running_loop()
        self._crew = crew
        kafka = self._settings.kafka
        patiently = Patience(kafka, self._readiness, stopping)
        partitions = await patiently(lambda: asyncio.to_thread(partitions_of, self._settings))
        await patiently(self._recover)
        self._producer = RecordProducer(kafka, name="coordinator")
        self._opened.append(self._producer.aclose)
        self._writer = LedgerWriter(kafka, self._settings.pool)
        self._opened.append(self._writer.aclose)
        self._intake = Intake(kafka, partitions, self._take_in, self._crew.fail)
        self._opened.append(self._end_intake)
        self._reader = LedgerReader(
            kafka,
            self._settings.pool,
            self._catch_up.applied,
            self._read_ledger,
            loop=loop,
            on_error=self._crew.fail,
            on_stall=self._ledger_stalled,
        )
        self._opened.append(self._reader.aclose)
        self._reader.start()
        self._intake.warm_up()
        self._catch_up.goal = await patiently(self._reader.end_offset)

    def begin(self) -> None:
        """The link hears: takes part in the election."""
        self._note_progress()
        self._crew.spawn(self._measure_backlog())
        if self._config is not None:
            self._crew.spawn(self._keeper(self._config).run())
        self._pump()

    async def _recover(self) -> None:
        """Goes on from the newest good snapshot; before DDS, for nobody waits for us yet."""
        begun = monotonic_ms()

        def say(line: str) -> None:
            log.warning("recovery", extra={"reason": line})

        kafka, pool = self._settings.kafka, self._settings.pool
        state, head, _ = await asyncio.to_thread(recover, kafka, pool, say=say)
        if head is not None:
            self._core.adopt(state)
            took = {"offset": head.next_offset, "took_ms": monotonic_ms() - begun}
            log.info("recovered from a snapshot", extra=took)
            if state.members:
                self._adopt(state.members_version, state.members)
        self._catch_up.applied = state.next_offset

    def _keeper(self, config: Path) -> SnapshotKeeper:
        return SnapshotKeeper(
            self._settings,
            config,
            lambda: self._core.role is Role.LEADING,
            lambda: self._catch_up.applied,
            lambda written: self._metrics.snapshot(written.next_offset, written.took_ms),
        )

    def step_down(self) -> bool:
        """Gives the role up; True where it had it."""
        leads = self._election.standing is Standing.LEADER
        if leads:
            self._to_election(ev.StepDown(reason="shutdown"))
        return leads

    async def close(self) -> None:
        """Ends what `open` began."""
        if self._timer is not None:
            self._timer.cancel()
        while self._opened:
            await self._opened.pop()()

    async def _end_intake(self) -> None:
        self._intake.end()

    # --- facts in -----------------------------------------------------------------------------

    def hear(self, bodies: list[ControlBody]) -> None:
        """What the process heard for this pool."""
        for body in bodies:
            match body:
                case Ballot():
                    self._work.append(("election", ev.BallotReceived(ballot=body)))
                case BallotReply():
                    self._work.append(("election", ev.BallotReplyReceived(reply=body)))
                case Beacon():
                    self._work.append(("election", ev.BeaconReceived(beacon=body)))
                    if body.role == self._role:
                        self._work.append(("core", ev.StateClaimed(beacon=body)))
                case NodeReport():
                    self._work.append(("core", ev.NodeReported(report=body)))
                case AttemptStatus():
                    self._work.append(("core", ev.StatusReported(status=body)))
                case _:
                    log.warning("unexpected control body", extra={"kind": type(body).__name__})
        self._pump()

    def _read_ledger(self, entries: list[tuple[int, LedgerEntry]]) -> None:
        for offset, entry in entries:
            self._work.append(("core", ev.LedgerRead(offset=offset, entry=entry)))
        self._pump()
        self._catch_up.applied = entries[-1][0] + 1
        self._reader.done(len(entries))
        self._note_progress()
        self._pump()

    def _note_progress(self) -> None:
        caught_up = self._catch_up.done
        if caught_up and self._needs in self._readiness.needed:
            self._readiness.have(self._needs)
            log.info("caught up with the ledger", extra={"offset": self._catch_up.applied})
        self._work.append(
            (
                "election",
                ev.LedgerAdvanced(
                    term=self._core.state.term,
                    leader=self._core.state.gate.leader,
                    next_offset=self._catch_up.applied,
                    caught_up=caught_up,
                    digest=self._core.state.digest.hex(),
                ),
            )
        )

    def _ledger_stalled(self, stalled: bool, reason: str) -> None:
        self._to_core(ev.LedgerStalled(stalled=stalled, reason=reason))

    def _take_in(self, events: list[IntakeEvent]) -> None:
        self._work.extend(("core", event) for event in events)
        self._pump()

    def peer_gone(self, peer: str) -> None:
        """A hint: `peer`'s process is gone."""
        self._to_election(ev.PeerGone(peer=peer))

    def _to_election(self, event: ev.ElectionEvent) -> None:
        self._work.append(("election", event))
        self._pump()

    def _to_core(self, event: ev.CoordinatorEvent) -> None:
        self._work.append(("core", event))
        self._pump()

    # --- the loop -----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hands every waiting fact to its core and performs the effects, in order."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._work:
                machine, event = self._work.popleft()
                if machine == "election":
                    for effect in self._election.step(event, self._now()):
                        self._perform_election(effect)
                else:
                    for order in self._core.step(event, self._now()):
                        self._perform(order)
        except Exception as error:  # noqa: BLE001 - a bug ends the process, and not its timer alone
            self._crew.fail(error)
        finally:
            self._pumping = False
        self._metrics.observe(self._core, self._election, self._process.refused(self))
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = self._now()
        wakeup = self._election.next_wakeup_ms(now)
        core = self._core.next_wakeup_ms(now)
        if core is not None:
            wakeup = min(wakeup, core)
        delay_s = max(0, wakeup - now) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._work.append(("election", ev.Tick()))
        self._work.append(("core", ev.Tick()))
        self._pump()

    # --- effects out --------------------------------------------------------------------------

    def _perform_election(self, effect: ev.ElectionEffect) -> None:
        match effect:
            case ev.SendBallot(ballot=ballot):
                self._link.send(topics.BALLOT, ballot, ballot.term)
            case ev.SendBallotReply(reply=reply):
                self._link.send(topics.BALLOT_REPLY, reply, reply.term, to=reply.candidate)
            case ev.SendBeacon(beacon=beacon):
                self._link.send(topics.BEACON, beacon, beacon.term)
            case ev.TakeRole(term=term, why=why):
                log.info("elected", extra={"role": self._role, "term": term, "why": why})
                self._work.append(("core", ev.RoleWon(term=term, why=why)))
            case ev.ProbeLedger():
                self._crew.spawn(self._probe())
            case ev.ShowVoters(voters=voters):
                self._work.append(("core", ev.VotersHeard(voters=voters)))
            case ev.LoseRole(reason=reason):
                log.info("no longer elected", extra={"role": self._role, "reason": reason})
                self._work.append(("core", ev.RoleLost(reason=reason)))

    def _adopt(self, version: int, members: Members) -> None:
        """Votes, hints, keys and DDS peers follow the ledger's membership."""
        members = merged(members, self._settings.coordinators)
        names = [peer.name for peer in members]
        log.info("membership", extra={"version": version, "members": names})
        if self._own.name in names:
            self._readiness.have(NO_MEMBER + self._settings.pool)
        else:
            no_member = NO_MEMBER + self._settings.pool
            log.warning(no_member, extra={"hint": "`outrider members add` makes it one"})
            self._readiness.need(no_member)
        self._process.follow(self._settings.pool, members)
        self._work.append(("election", ev.MembersAdopted(version=version, members=members)))

    def _perform(self, effect: ev.CoordinatorEffect) -> None:
        match effect:
            case ev.Append(entry=entry):
                self._append(entry)
            case ev.SendIntent(intent=intent):
                self._link.send(topics.INTENT, intent, intent.term)
            case ev.OpenIntake(term=term, positions=positions):
                self._intake.open(term, positions)
            case ev.CloseIntake():
                self._intake.close()
                self._intake.warm_up()
            case ev.SetIntake():
                self._intake.set(effect)
            case ev.WriteDeadLetter(letter=letter):
                self._keep(letter)
            case ev.PublishQueueState(state=state):
                self._link.send(topics.QUEUE_STATE, state, state.term)
                self._metrics.queue(state)
            case ev.ShowKafka(stalled=stalled, reason=reason):
                log.warning("kafka", extra={"stalled": stalled, "reason": reason})
                self._work.append(("election", ev.KafkaShown(stalled=stalled)))
            case ev.AdoptMembers(version=version, members=members):
                self._adopt(version, members)
            case ev.Leading(term=term):
                log.info("leading", extra={"role": self._role, "term": term})
            case ev.ShowDivergence(reason=reason):
                log.error("state differs from the leader's", extra={"reason": reason})
                self._readiness.need(f"a restart: {reason}")
                self._metrics.diverged()
                self._work.append(("election", ev.Barred(reason=reason)))
            case ev.Resign(reason=reason, to=to):
                log.warning("resigning", extra={"reason": reason})
                self._work.append(("election", ev.StepDown(reason=reason, to=to)))

    def _append(self, entry: LedgerEntry) -> None:
        future = self._writer.append(entry)
        future.add_done_callback(partial(self._appended, entry))

    def _appended(self, entry: LedgerEntry, future: "asyncio.Future[int]") -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            return
        retryable = isinstance(error, PlatformFaultError) and error.retryable
        self._to_core(
            ev.AppendFailed(term=entry.term, seq=entry.seq, retryable=retryable, reason=str(error))
        )

    def _keep(self, letter: DeadLetter) -> None:
        if letter.key not in self._storing:
            self._storing.add(letter.key)
            self._crew.spawn(self._store_dead_letter(letter))

    async def _store_dead_letter(self, letter: DeadLetter) -> None:
        loop = asyncio.get_running_loop()
        kafka = self._settings.kafka
        while True:
            try:
                try:
                    original, content_type = await loop.run_in_executor(
                        None, fetch_original, kafka, letter.source
                    )
                except ConfigError as error:  # its topic is gone, and the submission with it
                    log.warning("dead letter without its original", extra={"reason": str(error)})
                    original, content_type = None, ""
                whole = with_original(letter, original, content_type)
                await write_dead_letter(self._producer, kafka, whole)
            except PlatformFaultError as error:
                log.warning("dead letter not stored yet", extra={"reason": str(error)})
                await asyncio.sleep(DEAD_LETTER_RETRY_S)
            else:
                self._storing.discard(letter.key)
                self._to_core(ev.DeadLetterWritten(key=letter.key))
                return

    async def _probe(self) -> None:
        """Asks the ledger's broker where the ledger ends."""
        try:
            await self._reader.end_offset(PROBE_TIMEOUT_S)
        except PlatformFaultError:
            reached = False  # why is told by the reader's own watch
        else:
            reached = True
        self._to_election(ev.LedgerProbed(reached=reached))

    async def _measure_backlog(self) -> None:
        while True:
            await asyncio.sleep(BACKLOG_EVERY_S)
            try:
                backlog = await self._intake.backlog()
            except PlatformFaultError as error:
                log.warning("queue depth unknown", extra={"reason": str(error)})
                continue
            for queue, unread in backlog.items():
                self._to_core(ev.BacklogMeasured(queue=queue, unread=unread))


def with_original(letter: DeadLetter, original: bytes | None, content_type: str) -> DeadLetter:
    """The letter with the submission's own bytes."""
    return replace(letter, original=original, content_type=content_type)


def partitions_of(settings: ClusterSettings) -> Partitions:
    """Every partition that a leader reads. Raises ConfigError, BrokerUnavailableError."""
    names = TopicNames(settings.kafka.prefix)
    topic_names = [
        *(names.queue(queue) for queue in settings.queues),
        names.results,
        names.commands,
    ]
    return tuple(
        (topic, partition)
        for topic in topic_names
        for partition in range(require_partitions(settings.kafka, topic, PARTITIONS_S))
    )


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="outrider-coordinator", description=__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, action="append",
        help="cluster file; several for several pools that this process serves",
    )  # fmt: skip
    parser.add_argument("--name", required=True, help="which coordinator of the file this is")
    parser.add_argument(
        "--key-file", default="", help="its Ed25519 key (default: NAME.key beside the secret file)"
    )
    parser.add_argument("--metrics-address", default="127.0.0.1")
    parser.add_argument("--metrics-port", type=int, default=0, help="0: no /metrics, no /ready")
    parser.add_argument("--log-level", default="INFO")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 stopped, 1 platform fault, 2 configuration."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    configure_logging(options.name, options.log_level)

    async def serve(stopping: asyncio.Event) -> None:
        files = [load_cluster(path, os.environ) for path in options.config]
        settings, name = files[0], options.name
        check_pools(files, name)
        require_alone(settings.coordinator(name))
        timing = choose_timing(
            raise_priority(realtime=settings.election.realtime), settings.election
        )
        log.info("election timing", extra=timing._asdict())
        if len(settings.coordinators) == 1:
            log.warning("one coordinator alone: not redundant")
        readiness = Readiness()
        incarnation = Incarnation(new_incarnation())
        process = CoordinatorProcess(files, name, incarnation, options.key_file)
        for file, path in zip(files, options.config, strict=True):
            process.add(PoolCoordinator(file, name, incarnation, timing, readiness, process, path))
        stop_metrics = None
        if options.metrics_port:
            stop_metrics = serve_metrics(options.metrics_address, options.metrics_port, readiness)
        try:
            await process.run(stopping)
        finally:
            if stop_metrics is not None:
                stop_metrics()

    return run_process("outrider-coordinator", serve)


if __name__ == "__main__":
    sys.exit(main())
