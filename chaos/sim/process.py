"""One simulated coordinator process: the real Election and Coordinator, and the driver's duties.

Does what `controlplane.coordinator` does, the simplest way: facts in order, effects in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from chaos.sim.clock import ProcessClock
from chaos.sim.network import Endpoint, Sealed
from chaos.sim.world import Violation
from controlplane.core import events as e
from controlplane.core.coordinator import Coordinator, Role
from controlplane.core.election import Election
from controlplane.core.membership import Member
from dataplane.core.snapshot import Image, restored
from idl.codec import decode_entry
from idl.control import AttemptStatus, Ballot, BallotReply, Beacon, NodeReport
from idl.ids import CoordinatorId, Incarnation
from idl.ledger import LedgerEntry

if TYPE_CHECKING:
    from chaos.sim.cluster import Cluster

ENTRIES_PER_READ = 20
RECORDS_PER_READ = 8
HAND_OVER_MS = 8
"""A poll thread hands records over later; by then the intake may be another one."""
IDLE_MS = 200
KAFKA_FIRST = 0.5
"""Chance that one that wakes reads the ledger before it hears anybody: two threads, one loop."""
FROM_THE_START = 0.3
"""Share of restarts that find no snapshot."""
POLL_MS = 50
PROBE_TIMEOUT_MS = 300
SILENT_MS = 400
QUEUE_PREFIX = "queue."


class SimCoordinator:
    """Alive until `die`; hung between `hang` and `wake`: what comes then waits for it."""

    def __init__(self, cluster: Cluster, name: str, incarnation: int) -> None:
        self.cluster, self.name, self.incarnation = cluster, name, incarnation
        world, wall = cluster.world, cluster.walls[name]
        self.world = world
        self.dice = world.dice(f"process/{name}/{incarnation}")
        self.clock = ProcessClock(world, wall, cluster.drift_ppm[name])
        self.endpoint = Endpoint(cluster.network, name, incarnation, wall)
        self.alive, self.hung, self.deaf_to_kafka = True, False, False
        self.faints_ms = 0
        """Set: it hangs for this long as soon as it has appended, before it reads that back."""
        self.core = Coordinator(
            CoordinatorId(name), Incarnation(incarnation), cluster.pool, cluster.policies,
            cluster.timing, cluster.file_of(name),
        )  # fmt: skip
        self.election = Election(
            f"scheduler/{cluster.pool}", name, incarnation,
            tuple(Member(name=peer.name) for peer in cluster.file_of(name)),
            cluster.election_timing, seed=cluster.seed * 1000 + incarnation,
            now_ms=self.clock.now_ms,
        )  # fmt: skip
        self._mailbox: deque[Callable[[], None]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._working = False
        self.read_to = self._recover()
        self.goal = len(cluster.kafka.ledger)
        self.intake: e.OpenIntake | None = None
        self.heard_kafka_ms, self.stalled = world.now, False
        self.positions: dict[tuple[str, int], int] = {}
        self.paused: set[tuple[str, str]] = set()
        self._nudged = False
        cluster.network.attach(name, lambda message: self.guard(partial(self.open, message)))
        if cluster.plant is not None:
            cluster.plant.on_coordinator(self)
        self.advanced()
        world.after(1, self.pump)
        world.after(1, self.tick)

    def _recover(self) -> int:
        """From one of the two snapshots there are, or from the ledger's start; where to read on."""
        images = self.cluster.checker.images
        if not images or self.dice.random() < FROM_THE_START:
            self.world.count("recovery", "ledger")
            return 0
        self.world.count("recovery", "snapshot")
        image = msgspec.msgpack.decode(self.dice.choice(images), type=Image)
        self.core.adopt(restored(image))
        state = self.core.state
        if state.members:
            self.elect(e.MembersAdopted(version=state.members_version, members=state.members))
        return state.next_offset

    # --- life ---------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """This process believes that it leads."""
        return self.alive and self.core.role is Role.LEADING

    def guard(self, what: Callable[[], None]) -> None:
        """Runs `what` if the process runs; a hung one finds it when it wakes."""
        if self.alive and self.hung:
            self._mailbox.append(what)
        elif self.alive:
            what()

    def die(self) -> None:
        """Nothing of it acts any more, but what it sent is on its way."""
        self.alive = False

    def wake(self) -> None:
        """Goes on where it was: the zombie. What waits in the sockets of Kafka may come before what
        waits in those of DDS: then it goes on by its old decisions until it reads of its end."""
        self.hung = False
        if self.alive and self.dice.random() < KAFKA_FIRST and self.reaches_kafka:
            self.read_ledger()
        while self._mailbox and not self.hung and self.alive:
            self._mailbox.popleft()()

    def faint(self) -> None:
        """It has just appended."""
        if self.faints_ms:
            self.hung = True
            self.world.count("fault", "fainted")
            self.world.note(f"{self.name} hangs for {self.faints_ms} ms", self.name)
            self.world.after(self.faints_ms, self.wake)
            self.faints_ms = 0

    def tick(self) -> None:
        """The driver's timer."""
        if not self.alive:
            return
        if not self.hung:
            self.elect(e.Tick())
            self.decide(e.Tick())
        now = self.clock.now_ms
        soon = min(
            self.election.next_wakeup_ms(now), self.core.next_wakeup_ms(now) or now + IDLE_MS
        )
        self.world.after(max(soon - now, 1), self.tick)

    # --- facts in -----------------------------------------------------------------------------

    def open(self, message: Sealed) -> None:
        """A control message arrived."""
        refusal = self.endpoint.refusal(message)
        if refusal:
            self.world.count("network", refusal)
            return
        match message.body:
            case Ballot() as ballot:
                self.elect(e.BallotReceived(ballot=ballot))
            case BallotReply() as reply:
                self.elect(e.BallotReplyReceived(reply=reply))
            case Beacon() as beacon:
                self.elect(e.BeaconReceived(beacon=beacon))
                self.decide(e.StateClaimed(beacon=beacon))
            case NodeReport() as report:
                self.decide(e.NodeReported(report=report))
            case AttemptStatus() as status:
                self.decide(e.StatusReported(status=status))

    def pump(self) -> None:
        """A poll now and then, besides those that news cause."""
        if self.alive:
            self.nudge()
            self.guard(self.watch_broker)
            self.world.after(POLL_MS, self.pump)

    def watch_broker(self) -> None:
        """As the reader's watch: a broker that is silent for long enough stalls."""
        now = self.world.now
        if self.reaches_kafka:
            self.heard_kafka_ms = now
        stalled = now - self.heard_kafka_ms >= SILENT_MS
        if stalled is not self.stalled:
            self.stalled = stalled
            self.decide(e.LedgerStalled(stalled=stalled, reason="the broker is silent"))

    def nudge(self) -> None:
        """There is something new in Kafka, or there may be."""
        if not self._nudged:
            self._nudged = True
            self.world.after(self.dice.randint(1, 6), self.poll)

    def poll(self) -> None:
        """Reads what is new in Kafka: the ledger always, the rest while the intake is open."""
        self._nudged = False
        usable = self.reaches_kafka and not self.deaf_to_kafka
        if self.alive and not self.hung and usable:
            self.read_ledger()
            self.read_intake()

    @property
    def reaches_kafka(self) -> bool:
        """Its broker answers it."""
        return self.cluster.kafka.available and self.name not in self.cluster.cut_off

    def probed(self) -> None:
        """The broker was asked where the ledger ends."""
        self.world.count("log", "probe_answered" if self.reaches_kafka else "probe_unanswered")
        self.elect(e.LedgerProbed(reached=self.reaches_kafka))

    def read_ledger(self) -> None:
        """Some entries, and what follows from each."""
        ledger = self.cluster.kafka.ledger
        before = self.read_to
        for _ in range(ENTRIES_PER_READ):
            if self.read_to >= len(ledger):
                break
            offset, self.read_to = self.read_to, self.read_to + 1
            entry = decode_entry(offset, ledger[offset])
            self.decide(e.LedgerRead(offset=offset, entry=entry))
            self.cluster.checker.compare(self.name, self.core.state, offset)
        if self.read_to != before:
            self.advanced()
            self.nudge()

    def advanced(self) -> None:
        """Tells the election how far this process is."""
        self.elect(
            e.LedgerAdvanced(
                term=self.core.state.term, leader=self.core.state.gate.leader,
                next_offset=self.read_to,
                caught_up=self.read_to >= self.goal,
                digest=self.core.state.digest.hex(),
            )
        )  # fmt: skip

    def read_intake(self) -> None:
        """Queues, results and commands from where the intake was opened."""
        for (topic, partition), records in self.cluster.kafka.records.items():
            queue = topic.removeprefix(QUEUE_PREFIX) if topic.startswith(QUEUE_PREFIX) else ""
            stream = "queue" if queue else topic
            if self.intake is None or (stream, queue) in self.paused:
                continue
            start = self.positions.get((topic, partition), 0)
            found = tuple(records[start : start + self.dice.randint(1, RECORDS_PER_READ)])
            if found:
                self.positions[(topic, partition)] = start + len(found)
                self.nudge()
                late = partial(self.hand_in, stream, self.intake.term, found)
                self.world.after(HAND_OVER_MS, partial(self.guard, late))

    def hand_in(self, stream: str, term: int, found: tuple[object, ...]) -> None:
        """Records that a poll brought."""
        if stream == "queue":
            self.decide(e.SubmissionsRead(term=term, submissions=found))  # type: ignore[arg-type]  # a partition holds one kind
        elif stream == "results":
            self.decide(e.ResultsRead(term=term, results=found))  # type: ignore[arg-type]  # as above
        else:
            self.decide(e.CommandsRead(term=term, commands=found))  # type: ignore[arg-type]  # as above

    # --- the loop: one fact at a time, its effects after it -----------------------------------

    def elect(self, event: e.ElectionEvent) -> None:
        """Hands a fact to the election."""
        self._do(partial(self._elect, event))

    def decide(self, event: e.CoordinatorEvent) -> None:
        """Hands a fact to the coordinator core."""
        self._do(partial(self._decide, event))

    def _do(self, what: Callable[[], None]) -> None:
        self._work.append(what)
        if self._working:
            return
        self._working = True
        try:
            while self._work:
                self._work.popleft()()
        finally:
            self._working = False

    def _elect(self, event: e.ElectionEvent) -> None:
        for effect in self.election.step(event, self.clock.now_ms):
            match effect:
                case e.SendBallot(ballot=ballot):
                    self.to_peers("ballot", ballot)
                case e.SendBallotReply(reply=reply):
                    self.to_peers("reply", reply, reply.candidate)
                case e.SendBeacon(beacon=beacon):
                    self.to_peers("beacon", beacon)
                case e.TakeRole(term=term):
                    self.world.count("election", "elected")
                    self.world.note(f"{self.name} elected for term {term}", f"t{term}", self.name)
                    self.decide(e.RoleWon(term=term, why="elected"))
                case e.ProbeLedger():
                    late = self.dice.randint(1, 4) if self.reaches_kafka else PROBE_TIMEOUT_MS
                    self.world.after(late, partial(self.guard, self.probed))
                case e.ShowVoters(voters=voters):
                    self.decide(e.VotersHeard(voters=voters))
                case e.LoseRole(reason=reason):
                    cut = "Kafka" in reason
                    self.world.count("election", "handed_over_cut_off" if cut else "deposed")
                    self.world.note(f"{self.name} no longer elected: {reason}", self.name)
                    self.decide(e.RoleLost(reason=reason))

    def _decide(self, event: e.CoordinatorEvent) -> None:
        for effect in self.core.step(event, self.clock.now_ms):
            self._perform(effect)
        self.cluster.checker.after_step(self)

    # --- effects out --------------------------------------------------------------------------

    def _perform(self, effect: e.CoordinatorEffect) -> None:
        cluster = self.cluster
        match effect:
            case e.Append(entry=entry):
                cluster.checker.appending(self, entry)
                reached = self.name not in cluster.cut_off
                failed = partial(self.guard, partial(self.not_appended, entry))
                cluster.kafka.append(entry, failed, reached=reached)
                self.faint()
            case e.OpenIntake(positions=positions):
                self.intake, self.paused = effect, set()
                self.positions = {(p.topic, p.partition): p.next_offset for p in positions}
            case e.CloseIntake():
                self.intake = None
            case e.SetIntake(stream=stream, on=on, queue=queue):
                self.world.count("intake", "resumed" if on else "paused")
                (self.paused.discard if on else self.paused.add)((stream, queue))
            case e.SendIntent(intent=intent):
                cluster.checker.sending(self, intent)
                self.send(intent.node, "intent", intent.node, intent)
            case e.WriteDeadLetter(letter=letter):
                delay = self.dice.randint(1, 60)
                self.world.after(delay, partial(self.guard, partial(self.bury, letter.key)))
            case e.AdoptMembers(version=version, members=members):
                names = " ".join(member.name for member in members)
                self.world.count("membership", "adopted")
                self.world.note(f"{self.name} reads membership {version}: {names}", self.name)
                self.elect(e.MembersAdopted(version=version, members=members))
            case e.Leading(term=term):
                self.world.note(f"{self.name} leads term {term}", f"t{term}", self.name)
            case e.ShowDivergence(reason=reason):
                raise Violation("replay", f"{self.name} says: {reason}", self.name)
            case e.Resign(reason=reason, to=to):
                self.world.count("election", "resigned")
                self.world.note(f"{self.name} resigns: {reason}", self.name)
                self.elect(e.StepDown(reason=reason, to=to))
            case e.ShowKafka(stalled=stalled):
                self.world.count("log", "stall_shown" if stalled else "stall_over")
                self.elect(e.KafkaShown(stalled=stalled))
            case e.PublishQueueState():
                pass

    def not_appended(self, entry: LedgerEntry) -> None:
        """The producer gave up."""
        self.decide(
            e.AppendFailed(term=entry.term, seq=entry.seq, retryable=True, reason="timed out")
        )

    def bury(self, key: str) -> None:
        """The dead letter is in Kafka, as soon as there is one."""
        if not self.reaches_kafka:
            self.world.after(100, partial(self.guard, partial(self.bury, key)))
            return
        self.cluster.checker.dead_letters[key] = self.cluster.checker.dead_letters.get(key, 0) + 1
        self.decide(e.DeadLetterWritten(key=key))

    def to_peers(self, topic: str, body: object, to: str = "") -> None:
        """To every other coordinator, or to this one."""
        message = self.endpoint.seal(topic, "role", body)
        for peer in self.cluster.processes:
            if peer != self.name and to in ("", peer):
                self.cluster.network.send(self.name, peer, message)

    def send(self, to: str, topic: str, key: str, body: object) -> None:
        """To a node that calls this coordinator: it cannot be found otherwise."""
        if self.name not in self.cluster.nodes[to].agent.calls:
            self.world.count("network", "not_called")
            return
        self.cluster.network.send(self.name, to, self.endpoint.seal(topic, key, body))
