"""Small builders for tests of the cores: specs, entries, states, one coordinator under hand."""

from typing import Any, Final

from controlplane.core import events as e
from controlplane.core.coordinator import Coordinator
from controlplane.core.scheduler import Placement
from dataplane.core.state import PoolState
from idl import ledger as d
from idl.control import AttemptStatus, AttemptView, IntentItem, NodeReport
from idl.ids import CoordinatorId, Incarnation, PoolName
from idl.jobs import JobSpec, LimitName, Resources, Retry, SourceRef
from idl.members import Members
from idl.records import AttemptResult, CommandRecord, Outcome
from idl.settings import NodeTiming, QueuePolicy

MIB: Final = 1024 * 1024
ALL_LIMITS: Final[tuple[LimitName, ...]] = (
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
)  # fmt: skip
TIMING: Final = NodeTiming(
    report_ms=500, heartbeat_ms=250, lost_ms=3_000, resend_ms=200, exclusive_lease_ms=6_000
)
STAMPS_BEHIND_MS: Final = 900_000
"""How far the clocks of nodes (since boot) are behind the coordinator's (epoch)."""


def spec(job: str = "", **more: object) -> JobSpec:
    """A job of 1 CPU and 256 MiB; `cpu`, `memory`, `gpus` set resources, the rest the spec."""
    resources = Resources(
        cpu_millis=more.pop("cpu", 1_000),  # type: ignore[arg-type]
        memory_bytes=more.pop("memory", 256 * MIB),  # type: ignore[arg-type]
        gpus=more.pop("gpus", 0),  # type: ignore[arg-type]
    )
    return JobSpec(id=job, command=("true",), resources=resources, **more)  # type: ignore[arg-type]


def source(offset: int, topic: str = "queue.default", partition: int = 0) -> SourceRef:
    return SourceRef(topic=topic, partition=partition, offset=offset)


def seen(
    node: str = "n1",
    cpu: int = 2_000,
    memory: int = 4096 * MIB,
    gpus: tuple[int, ...] = (),
    incarnation: int = 1,
    labels: dict[str, str] | None = None,
    enforces: tuple[LimitName, ...] = ALL_LIMITS,
    draining: bool = False,
    images: dict[str, str] | None = None,
) -> d.NodeSeen:
    return d.NodeSeen(
        node=node, incarnation=incarnation, enforces=enforces, labels=labels or {},
        capacity=d.Capacity(cpu_millis=cpu, memory_bytes=memory, gpus=gpus), draining=draining,
        images=images or {},
    )  # fmt: skip


class Story:
    """A state told by appending decisions, one entry each call."""

    def __init__(self) -> None:
        self.state = PoolState()
        self.seq = 0
        self.at_ms = 1_000
        self.offsets: dict[str, int] = {}
        self.add(d.TermStarted(pool="main", previous_term=0))

    def add(self, *decisions: d.Decision) -> "Story":
        self.seq += 1
        self.at_ms += 10
        entry = d.LedgerEntry(
            term=1, leader="c1", incarnation=1, seq=self.seq, at_ms=self.at_ms,
            decisions=decisions,
        )  # fmt: skip
        assert self.state.apply(self.state.next_offset, entry).valid
        self.state.check_invariants()
        return self

    def source(self, topic: str) -> SourceRef:
        offset = self.offsets.get(topic, 0)
        self.offsets[topic] = offset + 1
        return source(offset, topic)

    def ingest(self, *specs: JobSpec, queue: str = "default") -> "Story":
        return self.add(
            *(d.Ingested(queue=queue, source=self.source(f"queue.{queue}"), job=s) for s in specs)
        )

    def assign(self, job: str, node: str = "n1", gpus: tuple[int, ...] = ()) -> "Story":
        attempt = self.state.jobs[job].attempt + 1
        incarnation = self.state.nodes[node].incarnation
        return self.add(
            d.Assigned(job=job, attempt=attempt, node=node, incarnation=incarnation, gpus=gpus)
        )

    def place(self, placement: Placement) -> "Story":
        """Carries out what the scheduler planned."""
        attempt = self.state.jobs[placement.job].attempt + 1
        return self.add(
            d.Assigned(
                job=placement.job, attempt=attempt, node=placement.node,
                incarnation=placement.incarnation, **placement.grant._asdict(),
            )
        )  # fmt: skip

    def start(self, job: str) -> "Story":
        return self.add(d.Started(job=job, attempt=self.state.jobs[job].attempt))

    def release(self, job: str, verdict: d.Decision, outcome: Outcome = "succeeded") -> "Story":
        attempt = self.state.jobs[job].attempt
        return self.add(
            d.Released(job=job, attempt=attempt, outcome=outcome, source=self.source("results")),
            verdict,
        )


class Hand:
    """One coordinator, driven by hand: what it appends is read back when the test says so."""

    def __init__(self, lead: bool = True, members: Members = (), **policy: Any) -> None:
        self.now = 1_000_000
        self.core = Coordinator(
            CoordinatorId("c1"), Incarnation(1), PoolName("main"),
            {"default": QueuePolicy(**policy)}, TIMING, members,
        )  # fmt: skip
        self.out: list[e.CoordinatorEffect] = []
        self.offset = 0
        self.read: dict[str, int] = {}
        if lead:
            self.step(e.RoleWon(term=1))
            self.settle()

    @property
    def state(self) -> PoolState:
        return self.core.state

    def step(self, event: e.CoordinatorEvent) -> tuple[e.CoordinatorEffect, ...]:
        out = self.core.step(event, self.now)
        self.out.extend(out)
        self.state.check_invariants()
        return out

    def pass_ms(self, ms: int, slice_ms: int = 500) -> None:
        """Time passes as for a live process: never asleep for long."""
        while ms > 0:
            self.now += min(ms, slice_ms)
            ms -= slice_ms
            self.step(e.Tick())
            self.settle()

    def appended(self) -> d.LedgerEntry | None:
        """The last entry ordered to be appended and not read back by `settle`."""
        found = [x.entry for x in self.out if isinstance(x, e.Append)]
        return found[-1] if found else None

    def land(self, entry: d.LedgerEntry) -> tuple[e.CoordinatorEffect, ...]:
        self.offset += 1
        return self.step(e.LedgerRead(offset=self.offset - 1, entry=entry))

    def settle(self) -> list[d.Decision]:
        """Reads back what is appended until there is nothing more; the decisions, in order."""
        decisions: list[d.Decision] = []
        while True:
            appends = [x for x in self.out if isinstance(x, e.Append)]
            if not appends:
                return decisions
            self.out = [x for x in self.out if not isinstance(x, e.Append)]
            for append in appends:
                decisions.extend(append.entry.decisions)
                self.land(append.entry)

    def take(self, kind: type[e.CoordinatorEffect]) -> list[e.CoordinatorEffect]:
        """Effects of one kind so far, removed."""
        found = [x for x in self.out if isinstance(x, kind)]
        self.out = [x for x in self.out if not isinstance(x, kind)]
        return found

    def intents(self) -> list[IntentItem]:
        return [
            item
            for effect in self.take(e.SendIntent)
            if isinstance(effect, e.SendIntent)
            for item in effect.intent.items
        ]

    def next_source(self, topic: str) -> SourceRef:
        offset = self.read.get(topic, 0)
        self.read[topic] = offset + 1
        return source(offset, topic)

    def submit(self, *specs: JobSpec, queue: str = "default") -> list[d.Decision]:
        submissions = tuple(
            e.Submission(source=self.next_source(f"queue.{queue}"), queue=queue, spec=s)
            for s in specs
        )
        self.step(e.SubmissionsRead(term=self.core.term, submissions=submissions))
        return self.settle()

    def node(self, node: d.NodeSeen | None = None) -> list[d.Decision]:
        self.step(e.NodeReported(report=report_of(node or seen())))
        return self.settle()

    def status(
        self, node: str, *views: tuple[str, int, str], full: bool = True, incarnation: int = 1
    ) -> list[d.Decision]:
        status = self.status_of(node, *views, full=full, incarnation=incarnation)
        self.step(e.StatusReported(status=status))
        return self.settle()

    def status_of(
        self, node: str, *views: tuple[str, int, str], full: bool = True, incarnation: int = 1
    ) -> AttemptStatus:
        attempts = tuple(AttemptView(job=j, attempt=a, phase=p) for j, a, p in views)  # type: ignore[arg-type]
        return AttemptStatus(
            pool="main", node=node, incarnation=incarnation, term=1, full=full, attempts=attempts,
            stamp_ms=self.now - STAMPS_BEHIND_MS,
        )  # fmt: skip

    def result(
        self, job: str, attempt: int = 1, outcome: Outcome = "succeeded", node: str = "n1"
    ) -> list[d.Decision]:
        result = AttemptResult(job=job, attempt=attempt, node=node, term=1, outcome=outcome)
        read = e.ResultRead(source=self.next_source("results"), result=result)
        self.step(e.ResultsRead(term=self.core.term, results=(read,)))
        return self.settle()

    def command(self, command: object) -> list[d.Decision]:
        record = CommandRecord(by="tester", command=command)  # type: ignore[arg-type]
        read = e.CommandRead(source=self.next_source("commands"), record=record)
        self.step(e.CommandsRead(term=self.core.term, commands=(read,)))
        return self.settle()


def report_of(node: d.NodeSeen) -> NodeReport:
    """What a node says of itself, for this to be decided."""
    return NodeReport(
        pool="main", node=node.node, incarnation=node.incarnation, capacity=node.capacity,
        enforces=node.enforces, labels=node.labels, draining=node.draining,
        topology=node.topology, simulated=node.simulated, images=node.images,
    )  # fmt: skip


def names(decisions: list[d.Decision]) -> list[str]:
    return [type(decision).__name__ for decision in decisions]


RETRY_FAST: Final = Retry(max_attempts=2, backoff_ms=100)


def with_running_job(**more: object) -> Hand:
    """A leader, node n1, job a running on it as attempt 1."""
    hand = Hand()
    hand.node()
    hand.submit(spec("a", **more))
    hand.status("n1", ("a", 1, "running"))
    hand.out.clear()
    return hand
