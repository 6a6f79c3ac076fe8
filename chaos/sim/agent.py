"""One simulated node: the real AgentCore, a runner whose jobs are numbers, and a disk.

Two ways to restart, as in the product: the node comes back as a new incarnation and its jobs are
gone, or its journal and its jobs outlived the process and the same incarnation takes them up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from chaos.sim.clock import MILLION
from chaos.sim.network import Endpoint, Sealed
from chaos.sim.world import Violation
from controlplane.core.events import ResultRead
from idl.control import AssignIntent, Intent, NodeReport
from idl.ids import PoolName
from idl.jobs import LimitName
from idl.ledger import Capacity
from idl.records import AttemptResult, Outcome
from node_agent.core import attempts as core
from node_agent.core.pace import StatusPace

if TYPE_CHECKING:
    from chaos.sim.cluster import Cluster

ALL_LIMITS: Final[tuple[LimitName, ...]] = (
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
)  # fmt: skip
CAPACITY: Final = Capacity(cpu_millis=4_000, memory_bytes=2**32, gpus=(0, 1))
SLOW_DISK_MS: Final = 700
DELIVERY_RETRY_MS: Final = 100
Key = tuple[str, int]


@dataclass
class Job:
    """One attempt as this node's kernel and disk know it: it outlives the agent's process."""

    assign: AssignIntent
    term: int
    phase: core.Phase
    outcome: Outcome | None = None
    ends_ms: int = 0
    """World time at which the program ends by itself; 0 before it runs."""
    died: bool = False
    """With its launcher, while no agent was there."""
    lease_until_ms: int = 0
    """By the node's boot clock, as the launcher and the journal know it; 0: not exclusive."""
    lease_over: bool = False
    """The launcher ended it."""


class SimAgent:
    """One agent process. `node` outlives it: see `Node`."""

    def __init__(self, cluster: Cluster, node: Node, incarnation: int, *, keeps: bool) -> None:
        self.cluster, self.node, self.incarnation = cluster, node, incarnation
        self.world, self.name = cluster.world, node.name
        self.alive, self.hung = True, False
        self.dice = node.dice
        self.endpoint = Endpoint(cluster.network, node.name, node.process, cluster.walls[node.name])
        self.core = core.AgentCore(
            PoolName(cluster.pool), node.name, incarnation, CAPACITY, frozenset(ALL_LIMITS)
        )
        self.highest_term = node.term
        self.calls = {member.name for member in cluster.file}
        """Coordinators that it knows: those of its file until it is told of others."""
        self._pace = StatusPace()
        self._mailbox: deque[Callable[[], None]] = deque()
        cluster.network.attach(node.name, lambda message: self.guard(partial(self.open, message)))
        if cluster.plant is not None:
            cluster.plant.on_agent(self)
        if keeps:
            self._take_up()
        self.world.after(1, self.report)
        self.world.after(2, self.heartbeat)

    def _take_up(self) -> None:
        """What an earlier process of this incarnation journalled goes on."""
        restored = {
            key: core.Restored(
                assign=job.assign if job.phase in core.HOLDING else None,
                phase=job.phase,
                lease_until_ms=job.lease_until_ms,
            )
            for key, job in self.node.jobs.items()
        }
        self.core.restore(restored, self.node.term)
        for key, job in list(self.node.jobs.items()):
            ended: Outcome | None = "node_lost" if job.lease_over else None
            ended = "platform" if job.died else ended
            if ended is not None and job.phase in core.HOLDING:
                self.world.after(1, partial(self.guard, partial(self.end, key, ended)))
            elif job.phase is core.Phase.ACCEPTED:
                self.world.after(
                    self.dice.randint(1, 20), partial(self.guard, partial(self.run, key))
                )
            elif job.phase is core.Phase.RUNNING:
                wait = max(job.ends_ms - self.world.now, 0)
                self.world.after(wait, partial(self.guard, partial(self.end, key)))
            elif job.phase is core.Phase.REPORTING:
                self.world.after(1, partial(self.guard, partial(self.deliver, key)))

    # --- life ---------------------------------------------------------------------------------

    def guard(self, what: Callable[[], None]) -> None:
        """As for coordinators: a hung process finds it when it wakes."""
        if self.alive and self.hung:
            self._mailbox.append(what)
        elif self.alive:
            what()

    def wake(self) -> None:
        """Goes on where it was."""
        self.hung = False
        while self._mailbox and not self.hung and self.alive:
            self._mailbox.popleft()()

    def report(self) -> None:
        """What the node has, again and again."""
        if not self.alive:
            return
        if not self.hung:
            report = NodeReport(
                pool=self.cluster.pool, node=self.name, incarnation=self.incarnation,
                capacity=CAPACITY, enforces=ALL_LIMITS,
            )  # fmt: skip
            self.to_coordinators("report", report)
        self.world.after(self.cluster.timing.report_ms, self.report)

    def heartbeat(self) -> None:
        """A full status, again and again."""
        if not self.alive:
            return
        if not self.hung:
            self.step(core.HeartbeatDue())
        self.world.after(self.cluster.timing.heartbeat_ms, self.heartbeat)

    # --- facts in, orders out -----------------------------------------------------------------

    def open(self, message: Sealed) -> None:
        """An intent arrived."""
        refusal = self.endpoint.refusal(message)
        if refusal:
            self.world.count("network", refusal)
        elif isinstance(message.body, Intent):
            self.take(message.body)

    def take(self, intent: Intent) -> None:
        """Hands it to the core; an intent of an older term may cause nothing."""
        outdated = intent.term < self.highest_term
        effects = self.step(core.IntentReceived(intent))
        acted = [x for x in effects if not isinstance(x, core.SendStatus)]
        if outdated:
            self.world.count("agent", "older_term")
            if acted:
                raise Violation(
                    "agent-fence", f"{self.name} acted on an intent of term {intent.term} after "
                    f"one of term {self.highest_term}", self.name, f"t{intent.term}",
                )  # fmt: skip
        elif intent.node_incarnation == self.incarnation:
            self.highest_term = self.node.term = intent.term
        else:
            self.world.count("agent", "other_incarnation")

    def step(self, event: core.Event) -> tuple[core.Effect, ...]:
        """One fact, its orders, and the status that follows, as soon as it is due."""
        effects = self.core.step(event, self.node.boot_ms)
        for effect in effects:
            self._perform(effect)
        if self.core.has_news:
            due_ms = self._pace.changed(
                self.world.now, urgent=isinstance(event, core.AttemptRunning)
            )
            if due_ms is not None:
                self.world.after(due_ms - self.world.now, partial(self.guard, self.flush))
        self.core.check_invariants()
        return effects

    def flush(self) -> None:
        """One status for all that changed; of several planned, the later find nothing to say."""
        self._pace.sent(self.world.now)
        for effect in self.core.flush():
            self.world.count("agent", "told_one")
            self._perform(effect)

    def _perform(self, effect: core.Effect) -> None:
        match effect:
            case core.RunAttempt(assign=assign, term=term, lease_until_ms=until_ms):
                self._start(assign, term, until_ms)
            case core.KillAttempt(job=job, attempt=attempt):
                self.world.count("agent", "killed")
                late = partial(self.end, (job, attempt), "killed")
                self.world.after(self.dice.randint(1, 10), partial(self.guard, late))
            case core.RefuseAttempt(assign=assign, term=term):
                self.world.count("agent", "refused_attempt")
                key = (assign.job, assign.attempt)
                self.node.jobs[key] = Job(assign, term, core.Phase.ACCEPTED, "platform")
                self.world.after(1, partial(self.guard, partial(self.end, key)))
            case core.ExtendLease(job=job, attempt=attempt, until_ms=until_ms):
                self.world.count("agent", "lease_extended")
                self.node.extend((job, attempt), until_ms)
            case core.EndLease(job=job, attempt=attempt):
                self.world.count("agent", "lease_ended")
                over = partial(self.end, (job, attempt), "node_lost")
                self.world.after(self.dice.randint(1, 10), partial(self.guard, over))
            case core.ForgetAttempt(job=job, attempt=attempt):
                self.node.jobs.pop((job, attempt), None)
            case core.FollowMembers(members=members):
                self.world.count("membership", "followed_by_node")
                self.calls = {member.name for member in members}
            case core.SendStatus(status=status, to=to):
                self.to_coordinators("status", status, to)

    # --- the runner ---------------------------------------------------------------------------

    def _start(self, assign: AssignIntent, term: int, until_ms: int) -> None:
        key = (assign.job, assign.attempt)
        self.cluster.checker.attempt_taken(self, assign)
        self.node.jobs[key] = Job(assign, term, core.Phase.ACCEPTED, lease_until_ms=until_ms)
        delay = self.dice.randint(1, 12) + (SLOW_DISK_MS if self.node.disk_slow else 0)
        self.world.after(delay, partial(self.guard, partial(self.run, key)))

    def run(self, key: Key) -> None:
        """The job's own program starts, unless it was killed before or the disk is full."""
        job = self.node.jobs.get(key)
        if job is None or job.phase is not core.Phase.ACCEPTED or job.died:
            return
        if self.node.disk_full:
            self.world.count("agent", "no_disk")
            self.end(key, "platform")
            return
        if job.lease_until_ms and self.node.boot_ms >= job.lease_until_ms:
            self.end(key, "platform")  # the launcher refuses it
            return
        lasts = int(job.assign.spec.env["MS"])
        job.phase, job.ends_ms = core.Phase.RUNNING, self.world.now + lasts
        job.outcome = "succeeded" if self.dice.random() < 0.7 else "failed"
        self.world.note(f"{self.name} runs {key[0]}/{key[1]}", key[0], self.name)
        self.cluster.checker.attempt_begins(self.node, key, job.assign.spec)
        if job.lease_until_ms:
            self.node.watch_lease(key)
        self.step(core.AttemptRunning(*key))
        self.world.after(lasts, partial(self.guard, partial(self.end, key)))

    def end(self, key: Key, outcome: Outcome | None = None) -> None:
        """Nothing of the attempt is left on the node."""
        job = self.node.jobs.get(key)
        if job is None or job.phase not in core.HOLDING:
            return
        job.phase, job.outcome = core.Phase.REPORTING, outcome or job.outcome or "killed"
        self.cluster.checker.attempt_gone(self.node, key)
        self.world.note(f"{self.name}: {key[0]}/{key[1]} {job.outcome}", key[0], self.name)
        self.step(core.AttemptEnded(*key))
        delay = self.dice.randint(1, 30) + (SLOW_DISK_MS if self.node.disk_slow else 0)
        self.world.after(delay, partial(self.guard, partial(self.deliver, key)))

    def deliver(self, key: Key) -> None:
        """The result goes to Kafka, however long it takes; sometimes twice."""
        job = self.node.jobs.get(key)
        if job is None or job.phase is not core.Phase.REPORTING:
            return
        if self.node.cut_off or not self.cluster.kafka.available:
            self.world.after(DELIVERY_RETRY_MS, partial(self.guard, partial(self.deliver, key)))
            return
        self.node.produce_result(key, job)
        if self.dice.random() < 0.03:
            self.world.count("agent", "result_twice")
            self.node.produce_result(key, job)
        job.phase = core.Phase.ENDED
        self.step(core.ResultDelivered(*key))

    def to_coordinators(self, topic: str, body: object, to: str = "") -> None:
        """To this coordinator; to every one that it calls where `to` is none of these."""
        message = self.endpoint.seal(topic, self.name, body)
        called = {to} if to in self.calls else self.calls
        for name in self.cluster.processes:
            if name in called:
                self.cluster.network.send(self.name, name, message)


class Node:
    """The host: its disk and its running programs, under one agent process after another."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.dice = cluster.world.dice(f"node/{name}")
        self.jobs: dict[Key, Job] = {}
        self.term = 0
        self.process = 0
        self.booted_ms = 0
        self.disk_full = self.disk_slow = self.cut_off = False
        self.agent: SimAgent
        self.start()

    def start(self, *, keep: bool = False) -> None:
        """A new agent process. `keep`: it takes up journal and jobs under the old incarnation."""
        self.process = self.cluster.next_incarnation()
        incarnation = self.agent.incarnation if keep else self.process
        if not keep:
            self.jobs, self.term, self.booted_ms = {}, 0, self.cluster.world.now
        self.agent = SimAgent(self.cluster, self, incarnation, keeps=keep)

    def crash(self, *, keep: bool, launcher_dies: bool = False) -> None:
        """The agent's process dies. Without `keep` the whole node dies and forgets; with
        `launcher_dies` the journal is kept and the programs die."""
        self.agent.alive = False
        if launcher_dies:
            for key, job in self.jobs.items():
                if job.phase in core.HOLDING:
                    job.died = True
                    self.cluster.checker.attempt_gone(self, key)
        if keep:
            return
        for key, job in self.jobs.items():
            if job.phase in core.HOLDING:
                self.cluster.checker.attempt_gone(self, key)
            elif job.phase is core.Phase.REPORTING and self.dice.random() < 0.5:
                late = partial(self.produce_result, key, job)  # it was in a socket already
                self.cluster.world.after(self.dice.randint(1, 400), late)
        self.jobs = {}

    # --- the launcher's share: leases hold whether an agent is there or not ---------------------

    @property
    def boot_ms(self) -> int:
        """This host's CLOCK_BOOTTIME: from its last boot, by its own quartz."""
        elapsed = self.cluster.world.now - self.booted_ms
        return 1_000 + elapsed + elapsed * self.cluster.drift_ppm[self.name] // MILLION

    def extend(self, key: Key, until_ms: int) -> None:
        """The agent says that the lease was renewed."""
        job = self.jobs.get(key)
        if job is not None and self.boot_ms < job.lease_until_ms:
            job.lease_until_ms = max(job.lease_until_ms, until_ms)

    def watch_lease(self, key: Key) -> None:
        """Ends the attempt when its lease is over, and tells the agent, if there is one."""
        job = self.jobs.get(key)
        if job is None or job.phase is not core.Phase.RUNNING or job.died or job.lease_over:
            return
        left = job.lease_until_ms - self.boot_ms
        if left > 0:
            self.cluster.world.after(left, partial(self.watch_lease, key))
            return
        job.lease_over = True
        self.cluster.world.count("agent", "lease_ended_by_launcher")
        self.cluster.world.note(f"{self.name}: lease of {key[0]}/{key[1]} is over", key[0])
        self.cluster.checker.attempt_gone(self, key)
        agent = self.agent
        agent.guard(partial(agent.end, key, "node_lost"))

    def produce_result(self, key: Key, job: Job) -> None:
        """One record of the results topic."""
        assert job.outcome is not None, "it ended"
        kafka = self.cluster.kafka
        source = kafka.next_source("results", self.dice.randrange(self.cluster.partitions))
        result = AttemptResult(
            job=key[0], attempt=key[1], node=self.name, term=job.term, outcome=job.outcome
        )
        self.cluster.checker.results[source] = result
        kafka.produce(source, ResultRead(source=source, key=key[0], result=result))
