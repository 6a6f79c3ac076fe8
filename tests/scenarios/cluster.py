"""A whole cluster in one process, from one seed: real cores, fake log, network and agents.

Everything that may go wrong does: appends are delayed, repeated, or reported as failed though they
landed; messages are lost, delayed and reordered; coordinators crash, hang and are cut off; agents
restart, hang and come back as zombies. After `calm()` no new fault happens, and every job must end.

Time is simulated (ms); nothing here sleeps, and nothing is random but for the seed.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from controlplane.core import events as e
from controlplane.core.coordinator import Coordinator, Role
from controlplane.core.election import Election, ElectionTiming, Member
from dataplane.core.state import PoolState
from idl import ledger
from idl.codec import decode_entry, encode
from idl.control import AttemptStatus, AttemptView, CancelIntent, ForgetIntent, Intent, NodeReport
from idl.ids import CoordinatorId, Incarnation, PoolName
from idl.jobs import JobSpec, LimitName, Resources, Retry, SourceRef
from idl.ledger import Capacity, LedgerEntry
from idl.records import AttemptResult, CancelJob, CommandRecord, DrainNode, Outcome
from idl.settings import NodeTiming, QueuePolicy

POOL = PoolName("main")
QUEUE = "default"
ALL_LIMITS: Final[tuple[LimitName, ...]] = (
    "memory",
    "pids",
    "cpu",
    "network",
    "filesystem",
    "seccomp",
    "disk",
    "wall_time",
)
TIMING = NodeTiming(report_ms=500, heartbeat_ms=250, lost_ms=2_000, resend_ms=200)
ELECTION = ElectionTiming(heartbeat_ms=100, timeout_ms=500)
QUEUE_TOPIC, RESULTS, COMMANDS = f"queue.{QUEUE}", "results", "commands"
PARTITIONS = 2
HAND_OVER_MS = 8


@dataclass
class Faults:
    """Probabilities, all zero in calm times."""

    append_fails: float = 0.0
    append_late: float = 0.0
    append_twice: float = 0.0
    message_lost: float = 0.0

    @classmethod
    def rough(cls, rng: random.Random) -> "Faults":
        return cls(*(rng.choice((0.0, 0.05, 0.2)) for _ in range(4)))


@dataclass
class Log:
    """Kafka: topic partitions as lists."""

    ledger: list[bytes] = field(default_factory=list)
    records: dict[tuple[str, int], list[object]] = field(default_factory=lambda: defaultdict(list))

    def produce(self, topic: str, partition: int, record: object) -> SourceRef:
        records = self.records[(topic, partition)]
        records.append(record)
        return SourceRef(topic=topic, partition=partition, offset=len(records) - 1)


class Process:
    """One coordinator process: both cores and the driver's duties, done the simplest way."""

    def __init__(self, cluster: "Cluster", name: str, incarnation: int) -> None:
        self.cluster, self.name, self.incarnation = cluster, name, incarnation
        self.alive, self.hung = True, False
        now = cluster.now
        self.core = Coordinator(
            CoordinatorId(name), Incarnation(incarnation), POOL, cluster.policies, TIMING
        )
        self.election = Election(
            "scheduler/main", name, incarnation, cluster.members, ELECTION,
            seed=cluster.seed * 1000 + incarnation, now_ms=now,
        )  # fmt: skip
        self.read_to = 0
        self.intake: e.OpenIntake | None = None
        self.positions: dict[tuple[str, int], int] = {}
        self.paused: set[tuple[str, str]] = set()
        self.mailbox: list[Callable[[], None]] = []
        self.elect(e.LedgerAdvanced(term=0, next_offset=0, caught_up=not cluster.log.ledger))
        cluster.after(1, self.pump)
        cluster.after(1, self.tick)

    def guard(self, what: Callable[[], None]) -> None:
        """Runs `what` if the process runs; a hung one finds it in its mailbox when it wakes."""
        if self.alive and self.hung:
            self.mailbox.append(what)
        elif self.alive:
            what()

    def wake(self) -> None:
        self.hung = False
        waiting, self.mailbox = self.mailbox, []
        for what in waiting:
            self.guard(what)

    def tick(self) -> None:
        if not self.alive:
            return
        if not self.hung:
            self.elect(e.Tick())
            self.decide(e.Tick())
        now = self.cluster.now
        soon = min(self.election.next_wakeup_ms(now), self.core.next_wakeup_ms(now) or now + 200)
        self.cluster.after(max(soon - now, 1), self.tick)

    # --- Kafka --------------------------------------------------------------------------------

    def pump(self) -> None:
        """Reads what is new in Kafka: the ledger always, the rest while the intake is open."""
        if not self.alive:
            return
        if not self.hung:
            self.read_ledger()
            self.read_intake()
        self.cluster.after(self.cluster.rng.randint(1, 6), self.pump)

    def read_ledger(self) -> None:
        log = self.cluster.log.ledger
        for _ in range(20):
            if self.read_to >= len(log):
                break
            offset, self.read_to = self.read_to, self.read_to + 1
            self.decide(e.LedgerRead(offset=offset, entry=decode_entry(offset, log[offset])))
            self.cluster.compare(self, offset)
        state = self.core.state
        self.elect(
            e.LedgerAdvanced(
                term=state.term, next_offset=self.read_to, caught_up=self.read_to >= len(log)
            )
        )

    def read_intake(self) -> None:
        for (topic, partition), records in list(self.cluster.log.records.items()):
            stream = "queue" if topic == QUEUE_TOPIC else topic
            if self.intake is None or (stream, QUEUE if stream == "queue" else "") in self.paused:
                continue
            start = self.positions.get((topic, partition), 0)
            found = tuple(records[start : start + self.cluster.rng.randint(1, 8)])
            if found:
                self.positions[(topic, partition)] = start + len(found)
                # A poll thread hands over later; by then the intake may be another one.
                late = partial(self.hand_in, topic, self.intake.term, found)
                self.cluster.after(HAND_OVER_MS, partial(self.guard, late))

    def hand_in(self, topic: str, term: int, found: tuple[object, ...]) -> None:
        if topic == QUEUE_TOPIC:
            self.decide(e.SubmissionsRead(term=term, submissions=found))  # type: ignore[arg-type]
        elif topic == RESULTS:
            self.decide(e.ResultsRead(term=term, results=found))  # type: ignore[arg-type]
        else:
            self.decide(e.CommandsRead(term=term, commands=found))  # type: ignore[arg-type]

    # --- effects ------------------------------------------------------------------------------

    def elect(self, event: e.ElectionEvent) -> None:
        for effect in self.election.step(event, self.cluster.now):
            match effect:
                case e.SendBallot():
                    self.to_peers(e.BallotReceived(ballot=effect.ballot))
                case e.SendBallotReply():
                    self.to_peers(e.BallotReplyReceived(reply=effect.reply))
                case e.SendBeacon():
                    self.to_peers(e.BeaconReceived(beacon=effect.beacon))
                case e.TakeRole():
                    self.decide(e.RoleWon(term=effect.term, why="elected"))
                case e.LoseRole():
                    self.decide(e.RoleLost(reason=effect.reason))

    def decide(self, event: e.CoordinatorEvent) -> None:
        cluster = self.cluster
        for effect in self.core.step(event, cluster.now):
            match effect:
                case e.Append():
                    cluster.append(self, effect.entry)
                case e.OpenIntake():
                    self.intake, self.paused = effect, set()
                    self.positions = {
                        (p.topic, p.partition): p.next_offset for p in effect.positions
                    }
                case e.CloseIntake():
                    self.intake = None
                case e.SetIntake():
                    change = self.paused.discard if effect.on else self.paused.add
                    change((effect.stream, effect.queue))
                case e.SendIntent():
                    cluster.to_agent(self.name, effect.intent)
                case e.WriteDeadLetter():
                    key = effect.letter.key
                    cluster.dead_letters[key] += 1
                    written = partial(self.decide, e.DeadLetterWritten(key=key))
                    cluster.after(cluster.rng.randint(1, 20), partial(self.guard, written))
                case e.Resign():
                    self.elect(e.StepDown(reason=effect.reason))
                case e.ShowKafka():
                    self.elect(e.KafkaShown(stalled=effect.stalled))
                case _:
                    pass

    def to_peers(self, event: e.ElectionEvent) -> None:
        for peer in self.cluster.members:
            if peer.name != self.name:
                self.cluster.send(self.name, peer.name, lambda p: p.elect(event))


@dataclass
class Run:
    """An attempt as its agent knows it."""

    phase: str
    outcome: Outcome
    ends_ms: int


class Agent:
    """A fake agent: idempotent intents, fencing by term, a result per attempt, heartbeats."""

    def __init__(self, cluster: "Cluster", name: str, incarnation: int) -> None:
        self.cluster, self.name, self.incarnation = cluster, name, incarnation
        self.alive, self.cut = True, False
        self.term = 0
        self.runs: dict[tuple[str, int], Run] = {}
        self.forgotten: set[tuple[str, int]] = set()
        self.capacity = Capacity(cpu_millis=4_000, memory_bytes=2**32, gpus=(0, 1))
        cluster.after(1, self.report)
        cluster.after(2, self.heartbeat)

    def report(self) -> None:
        if self.alive:
            report = NodeReport(
                pool=POOL, node=self.name, incarnation=self.incarnation, capacity=self.capacity,
                enforces=ALL_LIMITS,
            )  # fmt: skip
            self.to_coordinators(e.NodeReported(report=report))
            self.cluster.after(TIMING.report_ms, self.report)

    def heartbeat(self) -> None:
        if self.alive:
            self.status(full=True, keys=list(self.runs))
            self.cluster.after(TIMING.heartbeat_ms, self.heartbeat)

    def status(self, *, full: bool, keys: list[tuple[str, int]]) -> None:
        views = tuple(
            AttemptView(job=job, attempt=attempt, phase=self.runs[(job, attempt)].phase)  # type: ignore[arg-type]
            for job, attempt in keys
        )
        status = AttemptStatus(
            pool=POOL, node=self.name, incarnation=self.incarnation, term=self.term, full=full,
            attempts=views,
        )  # fmt: skip
        self.to_coordinators(e.StatusReported(status=status))

    def to_coordinators(self, event: e.CoordinatorEvent) -> None:
        if not self.cut:
            for member in self.cluster.members:
                self.cluster.send(self.name, member.name, lambda p: p.decide(event))

    def receive(self, intent: Intent) -> None:
        if not self.alive or self.cut or intent.term < self.term:
            return
        if intent.node_incarnation != self.incarnation:
            return
        self.term = intent.term
        for item in intent.items:
            key = (item.job, item.attempt)
            if isinstance(item, ForgetIntent):
                if self.runs.get(key) and self.runs[key].phase == "ended":
                    del self.runs[key]
                    self.forgotten.add(key)
            elif isinstance(item, CancelIntent):
                run = self.runs.get(key)
                if run and run.phase != "ended":
                    run.outcome = "killed"
                    self.end(key)
            elif key not in self.runs and key not in self.forgotten:
                self.start(key, item.spec)

    def start(self, key: tuple[str, int], spec: JobSpec) -> None:
        rng = self.cluster.rng
        outcome: Outcome = "succeeded" if rng.random() < 0.7 else rng.choice(("failed", "platform"))
        lasts = int(spec.env.get("MS", "50"))
        self.runs[key] = Run("accepted", outcome, self.cluster.now + lasts)
        self.status(full=False, keys=[key])
        self.cluster.after(rng.randint(1, 5), lambda: self.run(key))
        self.cluster.after(lasts + 6, lambda: self.end(key))

    def run(self, key: tuple[str, int]) -> None:
        run = self.runs.get(key)
        if self.alive and run and run.phase == "accepted":
            run.phase = "running"
            self.status(full=False, keys=[key])

    def end(self, key: tuple[str, int]) -> None:
        run = self.runs.get(key)
        if not self.alive or run is None or run.phase == "ended":
            return
        run.phase = "ended"
        job, attempt = key
        result = AttemptResult(
            job=job, attempt=attempt, node=self.name, term=self.term, outcome=run.outcome
        )
        self.cluster.after(self.cluster.rng.randint(1, 30), lambda: self.deliver(result))
        self.status(full=False, keys=[key])

    def deliver(self, result: AttemptResult) -> None:
        """A node that is cut off cannot reach Kafka either: its results come late."""
        if self.cut:
            self.cluster.after(100, lambda: self.deliver(result))
        else:
            self.cluster.produce_result(result)


class Cluster:
    """The world. `run_until(ms)` lets time pass; checks run as the ledger grows."""

    def __init__(self, seed: int, coordinators: int = 3, agents: int = 3) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.now = 1_000_000
        self.events: list[tuple[int, int, Callable[[], None]]] = []
        self.counter = 0
        self.log = Log()
        self.faults = Faults()
        self.blocked: set[tuple[str, str]] = set()
        self.policies = {QUEUE: QueuePolicy(live_jobs_max=12)}
        self.members = tuple(Member(name=f"c{i}") for i in range(1, coordinators + 1))
        self.dead_letters: dict[str, int] = defaultdict(int)
        self.auditor = PoolState()
        self.hashes: dict[int, str] = {}
        self.terms: dict[int, tuple[str, int]] = {}
        self.ends: dict[str, list[str]] = defaultdict(list)
        self.accepted: dict[str, int] = defaultdict(int)
        self.incarnations = 0
        self.processes: dict[str, Process] = {}
        self.agents: dict[str, Agent] = {}
        for member in self.members:
            self.start_coordinator(member.name)
        for number in range(1, agents + 1):
            self.start_agent(f"n{number}")

    # --- time and messages --------------------------------------------------------------------

    def after(self, delay_ms: int, what: Callable[[], None]) -> None:
        self.counter += 1
        heapq.heappush(self.events, (self.now + max(delay_ms, 0), self.counter, what))

    def run_until(self, now: int, done: Callable[[], bool] | None = None) -> None:
        while self.events and self.events[0][0] <= now:
            self.now, _, what = heapq.heappop(self.events)
            what()
            if done is not None and self.counter % 64 == 0 and done():
                return
        self.now = now

    def send(self, sender: str, to: str, what: Callable[[Process], None]) -> None:
        if (sender, to) in self.blocked or self.rng.random() < self.faults.message_lost:
            return
        delay = self.rng.choice((1, 1, 1, 2, 3, 8))

        def arrive() -> None:
            process = self.processes[to]
            process.guard(lambda: what(process))

        self.after(delay, arrive)

    def to_agent(self, sender: str, intent: Intent) -> None:
        if (sender, intent.node) in self.blocked or self.rng.random() < self.faults.message_lost:
            return
        self.after(self.rng.choice((1, 1, 2, 9)), lambda: self.agents[intent.node].receive(intent))

    # --- the log ------------------------------------------------------------------------------

    def append(self, process: Process, entry: LedgerEntry) -> None:
        rng, faults = self.rng, self.faults
        value = encode(entry)
        late = rng.random() < faults.append_late
        delay = rng.randint(50, 1_500) if late else rng.randint(1, 5)
        fails = rng.random() < faults.append_fails
        if not fails or late:
            self.after(delay, lambda: self.land(value))
        if rng.random() < faults.append_twice:
            self.after(delay + rng.randint(0, 50), lambda: self.land(value))
        if fails or late:  # reported as failed, whether it landed or will
            failed = e.AppendFailed(
                term=entry.term, seq=entry.seq, retryable=True, reason="timed out"
            )
            self.after(20, lambda: process.guard(lambda: process.decide(failed)))

    def land(self, value: bytes) -> None:
        """The log takes the record; the auditor is its most faithful reader."""
        offset = len(self.log.ledger)
        self.log.ledger.append(value)
        entry = decode_entry(offset, value)
        if not self.auditor.apply(offset, entry).valid:
            return
        for decision in entry.decisions:
            self.audit(entry, decision)
        self.auditor.check_invariants()
        self.hashes[offset] = self.auditor.state_hash()

    def audit(self, entry: LedgerEntry, decision: ledger.Decision) -> None:
        match decision:
            case ledger.TermStarted():
                assert entry.term not in self.terms, "two valid leaders of one term"
                assert entry.term > max(self.terms, default=0), "terms must grow"
                self.terms[entry.term] = (entry.leader, entry.incarnation)
            case (
                ledger.Finished(job=job) | ledger.DeadLettered(job=job) | ledger.Cancelled(job=job)
            ):
                self.ends[job].append(type(decision).__name__)
                assert len(self.ends[job]) == 1, f"{job} ended twice: {self.ends[job]}"
            case ledger.Released(job=job, outcome="succeeded"):
                self.accepted[job] += 1
                assert self.accepted[job] == 1, f"{job} has two accepted results"
            case _:
                pass

    def compare(self, process: Process, offset: int) -> None:
        """Every reader that applied the same prefix holds the same state (invariant 7)."""
        if offset in self.hashes and (offset % 16 == 0 or offset == len(self.log.ledger) - 1):
            found = process.core.state.state_hash()
            assert found == self.hashes[offset], f"{process.name} differs at offset {offset}"

    # --- the world's doings -------------------------------------------------------------------

    def start_coordinator(self, name: str) -> None:
        if name in self.processes:
            self.processes[name].alive = False
        self.incarnations += 1
        self.processes[name] = Process(self, name, self.incarnations)

    def start_agent(self, name: str) -> None:
        if name in self.agents:
            self.agents[name].alive = False
        self.incarnations += 1
        self.agents[name] = Agent(self, name, self.incarnations)

    def submit(self, name: str, spec: JobSpec) -> None:
        partition = self.rng.randrange(PARTITIONS)
        offset = len(self.log.records[(QUEUE_TOPIC, partition)])
        source = SourceRef(topic=QUEUE_TOPIC, partition=partition, offset=offset)
        record = e.Submission(source=source, queue=QUEUE, key=name, spec=spec)
        self.log.produce(QUEUE_TOPIC, partition, record)

    def submit_poison(self) -> None:
        offset = len(self.log.records[(QUEUE_TOPIC, 0)])
        source = SourceRef(topic=QUEUE_TOPIC, partition=0, offset=offset)
        record = e.Submission(
            source=source, queue=QUEUE, error_code="not-msgpack", error_message="not a record"
        )
        self.log.produce(QUEUE_TOPIC, 0, record)

    def command(self, command: CancelJob | DrainNode) -> None:
        offset = len(self.log.records[(COMMANDS, 0)])
        source = SourceRef(topic=COMMANDS, partition=0, offset=offset)
        record = CommandRecord(by="tester", command=command)
        self.log.produce(COMMANDS, 0, e.CommandRead(source=source, record=record))

    def produce_result(self, result: AttemptResult) -> None:
        partition = self.rng.randrange(PARTITIONS)
        offset = len(self.log.records[(RESULTS, partition)])
        source = SourceRef(topic=RESULTS, partition=partition, offset=offset)
        self.log.produce(RESULTS, partition, e.ResultRead(source=source, result=result))

    def crash_coordinator(self, name: str, *, hint: bool = True) -> None:
        self.processes[name].alive = False
        for peer in self.processes.values():
            if hint and peer.alive:
                self.after(2, partial(peer.guard, partial(peer.elect, e.PeerGone(peer=name))))
        self.after(self.rng.randint(200, 3_000), lambda: self.start_coordinator(name))

    def hang_coordinator(self, name: str, for_ms: int) -> None:
        process = self.processes[name]
        process.hung = True
        self.after(for_ms, process.wake)

    def cut_off(self, one: str, other: str, for_ms: int, *, both_ways: bool) -> None:
        links = {(one, other), (other, one)} if both_ways else {(one, other)}
        self.blocked |= links
        self.after(for_ms, lambda: self.blocked.difference_update(links))

    def restart_agent(self, name: str) -> None:
        self.agents[name].alive = False
        self.after(self.rng.randint(50, 1_000), lambda: self.start_agent(name))

    def cut_agent(self, name: str, for_ms: int) -> None:
        """The node goes on and nobody hears it: a zombie when it is declared lost."""
        agent = self.agents[name]
        agent.cut = True
        self.after(for_ms, lambda: setattr(agent, "cut", False))

    @property
    def leader(self) -> Process | None:
        leading = [p for p in self.processes.values() if p.alive and p.core.role is Role.LEADING]
        return max(leading, key=lambda p: p.core.term, default=None)

    def one_fault(self) -> None:
        """Something bad, and the next one some time later."""
        rng = self.rng
        names = [member.name for member in self.members]
        victim = self.leader.name if self.leader and rng.random() < 0.6 else rng.choice(names)
        agent = rng.choice(list(self.agents))
        match rng.randrange(9):
            case 0:
                self.crash_coordinator(victim, hint=rng.random() < 0.8)
            case 1:
                self.hang_coordinator(victim, rng.randint(50, 2_500))
            case 2:
                other = rng.choice(names)
                self.cut_off(victim, other, rng.randint(100, 2_000), both_ways=rng.random() < 0.5)
            case 3:
                self.restart_agent(agent)
            case 4:
                self.cut_agent(agent, rng.randint(100, 5_000))
            case 5:
                self.faults = Faults.rough(rng)
            case 6:
                for process in self.processes.values():  # a false alarm
                    process.guard(partial(process.elect, e.PeerGone(peer=victim)))
            case 7:
                self.usurp()
            case 8:
                self.agents["n3"].alive = False  # for good

    def usurp(self) -> None:
        """An election gone mad: several take the role at once, and of one term."""
        for process in self.processes.values():
            if self.rng.random() < 0.7:
                won = e.RoleWon(term=process.core.state.term + 1, why="usurped")
                late = partial(process.decide, won)
                self.after(self.rng.randint(0, 3), partial(process.guard, late))

    def random_spec(self) -> JobSpec:
        rng = self.rng
        return JobSpec(
            command=("true",),
            env={"MS": str(rng.choice((5, 50, 400)))},
            resources=Resources(cpu_millis=rng.choice((500, 1_000, 2_000)),
                                gpus=rng.choice((0, 0, 0, 1))),
            priority=rng.choice((0, 0, 5)),
            retry=Retry(max_attempts=4, backoff_ms=50),
            start_within_ms=rng.choice((0, 0, 0, 0, 3_000)),
        )  # fmt: skip

    def calm(self) -> None:
        """No new fault from here on; what is broken heals by itself."""
        self.faults = Faults()
