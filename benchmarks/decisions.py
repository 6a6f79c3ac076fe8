"""The leader's decisions alone, without I/O: does a job cost more where more jobs wait?

The coordinator core leads a pool of one node with 50 CPUs; what it appends is read back at once.

* *drains*: jobs of one CPU each wait; 50 end at a time and 50 others take their place.
* *fits nowhere*: the jobs ask for a GPU and there is none, so each of them is told why.
* *arrives late*: one more such job at a time comes to those that were told.
* *all differ*: on fifty such nodes each job asks for a host of its own, which is not there; then
  one node says something new of itself, and why each of them waits has to be found again.

CPU time per job of everything in `Coordinator.step`, ledger read-back included, and the longest
single step: while it lasts the leader hears nobody.
"""

import argparse
import sys
import time
from itertools import count
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from controlplane.core import events as e
from controlplane.core.bounds import RECORDS_PER_READ_MAX, WAITING_GRACE_MS
from controlplane.core.coordinator import Coordinator
from dataplane.core.jobs import Phase
from idl.control import NodeReport
from idl.ids import CoordinatorId, Incarnation, NodeId, PoolName
from idl.jobs import JobSpec, LimitName, Resources, SourceRef
from idl.ledger import Capacity
from idl.limits import LIVE_JOBS_MAX
from idl.records import AttemptResult
from idl.settings import NodeTiming, QueuePolicy

DEPTHS: Final = "1000,5000,19000"
"""The last one: nearly as many as a pool holds in memory."""
SLOTS: Final = 50
LATE_JOBS: Final = 200
STEP_MS: Final = 25
"""Of the core's own clock, between steps: more than an entry waits for company."""
HOSTS: Final = 50
POOL: Final = PoolName("main")
NODES: Final = tuple(NodeId(f"n{number}") for number in range(HOSTS))
NODE: Final = NODES[0]
ENFORCES: Final[tuple[LimitName, ...]] = (
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
)  # fmt: skip


class Figures(msgspec.Struct):
    """`cpu_us` a job, `longest_ms` of a single step."""

    workload: str
    waiting: int
    jobs: int
    cpu_us: float
    longest_ms: float


class Leader:
    """One coordinator core that leads, its clock, and what its steps took."""

    def __init__(self, nodes: int = 1) -> None:
        self._nodes = NODES[:nodes]
        policies = {"default": QueuePolicy(live_jobs_max=LIVE_JOBS_MAX)}
        self.core = Coordinator(CoordinatorId("c1"), Incarnation(1), POOL, policies, NodeTiming())
        self._now_ms = 1_000_000
        self._ledger = count()
        self._submissions = count()
        self._results = count()
        self.restart_clock()
        self.step(e.RoleWon(term=1))
        self._now_ms += WAITING_GRACE_MS
        self.report()

    def restart_clock(self) -> None:
        """What was measured so far is forgotten."""
        self.cpu_s = self.longest_s = 0.0

    def step(self, event: e.CoordinatorEvent) -> None:
        """One event, and all that follows from it until nothing is appended any more."""
        due: list[e.CoordinatorEvent] = [event]
        while due:
            self._now_ms += STEP_MS
            before = time.thread_time()
            effects = self.core.step(due.pop(0), self._now_ms)
            took = time.thread_time() - before
            self.cpu_s += took
            self.longest_s = max(self.longest_s, took)
            due += [
                e.LedgerRead(offset=next(self._ledger), entry=effect.entry)
                for effect in effects
                if isinstance(effect, e.Append)
            ]

    def report(self, labels: dict[str, str] | None = None) -> None:
        """The nodes say what they have, `labels` those of the first: otherwise they would be
        lost."""
        gib = 1 << 30
        capacity = Capacity(cpu_millis=1_000 * SLOTS, memory_bytes=SLOTS * gib, gpus=())
        for node in self._nodes:
            report = NodeReport(
                pool=POOL, node=node, incarnation=Incarnation(1), capacity=capacity,
                enforces=ENFORCES, labels=(labels or {}) if node == NODE else {},
            )  # fmt: skip
            self.step(e.NodeReported(report=report))

    def go_on(self) -> None:
        """For as long as it wants to go on at once."""
        while self.core.next_wakeup_ms(self._now_ms) == self._now_ms + 1:
            self.step(e.Tick())

    def submit(self, jobs: int, gpus: int = 0, *, differ: bool = False) -> None:
        """Jobs of one CPU and 1 MiB, in records as the driver hands them in."""
        asks = Resources(cpu_millis=1_000, memory_bytes=1 << 20, gpus=gpus)
        for begin in range(0, jobs, RECORDS_PER_READ_MAX):
            chunk = min(RECORDS_PER_READ_MAX, jobs - begin)
            submissions = tuple(self._submission(asks, differ) for _ in range(chunk))
            self.step(e.SubmissionsRead(term=1, submissions=submissions))
            self.report()

    def _submission(self, asks: Resources, differ: bool) -> e.Submission:
        offset = next(self._submissions)
        source = SourceRef(topic="queue.default", partition=0, offset=offset)
        labels = {"host": f"h{offset}"} if differ else {}
        spec = JobSpec(
            id=f"j{offset}", command=("true",), resources=asks, node_labels=labels
        )  # fmt: skip
        return e.Submission(source=source, queue="default", spec=spec)

    def end_all_running(self) -> int:
        """Every placed job succeeds; how many those were."""
        node = self.core.state.nodes[NODE]
        placed = [self.core.state.jobs[job] for job in node.attempts]
        results = tuple(
            e.ResultRead(
                source=SourceRef(topic="results", partition=0, offset=next(self._results)),
                result=AttemptResult(
                    job=job.id, attempt=job.attempt, node=NODE, term=1, outcome="succeeded"
                ),
            )
            for job in placed
        )
        self.step(e.ResultsRead(term=1, results=results))
        return len(placed)


def drains(waiting: int) -> Figures:
    """All wait, then all run and end."""
    leader = Leader()
    leader.submit(waiting)
    leader.restart_clock()
    ended = 0
    while ended < waiting:
        ended += leader.end_all_running()
        leader.report()
    assert not leader.core.state.jobs
    return _figures("drains", waiting, waiting, leader)


def fits_nowhere(waiting: int) -> list[Figures]:
    """All are told why they wait, then some more come."""
    leader = Leader()
    leader.submit(waiting, gpus=1)
    _require_told(leader)
    told = _figures("fits nowhere", waiting, waiting, leader)
    leader.restart_clock()
    for _ in range(LATE_JOBS):
        leader.submit(1, gpus=1)
    _require_told(leader)
    return [told, _figures("arrives late", waiting, LATE_JOBS, leader)]


def all_differ(waiting: int) -> Figures:
    """One offer changes while all wait, each with a shape of its own."""
    leader = Leader(HOSTS)
    leader.submit(waiting, differ=True)
    leader.go_on()
    _require_told(leader)
    leader.restart_clock()
    leader.report({"zone": "a"})
    leader.go_on()
    return _figures("all differ", waiting, waiting, leader)


def _require_told(leader: Leader) -> None:
    jobs = leader.core.state.jobs.values()
    assert all(job.phase is Phase.PENDING and job.waiting is not None for job in jobs)


def _figures(workload: str, waiting: int, jobs: int, leader: Leader) -> Figures:
    return Figures(
        workload=workload,
        waiting=waiting,
        jobs=jobs,
        cpu_us=leader.cpu_s / jobs * 1e6,
        longest_ms=leader.longest_s * 1e3,
    )


def main(argv: list[str] | None = None) -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--waiting", default=DEPTHS, help=f"how many wait (default: {DEPTHS})")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    try:
        depths = [int(word) for word in options.waiting.split(",")]
    except ValueError:
        parser.error(f"--waiting {options.waiting}: numbers with commas, such as {DEPTHS}")
    if not all(0 < depth < LIVE_JOBS_MAX - LATE_JOBS for depth in depths):
        parser.error(f"--waiting: between 1 and {LIVE_JOBS_MAX - LATE_JOBS - 1}")
    found: list[Figures] = []
    for depth in depths:
        sys.stderr.write(f"{depth} jobs wait\n")
        found += [drains(depth), *fits_nowhere(depth), all_differ(depth)]
    if options.json:
        print(msgspec.json.encode(found).decode())
        return 0
    table = Table("workload", "waiting", "jobs", "CPU µs a job", "longest step ms")
    for figures in sorted(found, key=lambda f: f.workload):
        numbers = f"{figures.cpu_us:.0f}", f"{figures.longest_ms:.1f}"
        table.add_row(figures.workload, f"{figures.waiting}", f"{figures.jobs}", *numbers)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
