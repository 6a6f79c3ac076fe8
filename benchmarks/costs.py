"""CPU ms per job by kind of process, from /proc, and where the Python of each kind spends it.

CPU time hardly depends on what else runs on the machine, wall time does: this is what to compare
before and after a change. A process's time is that of all its threads (proc(5): utime + stime);
a launcher's children are its jobs (cutime + cstime, counted when they are reaped).
What the kernel does on its own threads (removing network namespaces) is in nobody's account.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from dataplane.sampling import SIGNAL
from dataplane.tail import watermarks
from idl.settings import ClusterSettings
from idl.topics import TopicNames
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster
from outrider.local.process import send_signal

TICK_MS: Final = 1000 / os.sysconf("SC_CLK_TCK")
IDLE_S: Final = 4.0
"""How long the idle cluster is watched: enough ticks to see 1 % of a core."""
SAMPLES_WAIT_S: Final = 10.0
FUNCTIONS_SHOWN: Final = 25
OURS: Final = ("controlplane.", "dataplane.", "idl.", "node_agent.")
LOOP: Final = "(the event loop itself)"
LOOP_FUNCTION: Final = "asyncio.runners.Runner.run"
"""Innermost Python function while uvloop, which is C, does its own work."""
THREADS: Final = {
    "recv": "dds", "recvMC": "dds", "recvUC": "dds", "tev": "dds", "gc": "dds",
    "dq.builtins": "dds", "dq.user": "dds", "xmit.user": "dds", "tokio-rt-worker": "workers",
}  # fmt: skip
"""Threads of C libraries by what they are for; `rdk:…` are librdkafka's."""


class _Spent(NamedTuple):
    """CPU ms so far: the process's own, its reaped children's, and by thread (id → name, ms);
    and how often a thread of it went to sleep (each costs a wake-up)."""

    own_ms: float
    children_ms: float
    threads: dict[str, tuple[str, float]]
    sleeps: int


class _More(NamedTuple):
    """What was spent between two looks."""

    ms: float
    threads: dict[str, float]
    sleeps: float


class Cost(msgspec.Struct, kw_only=True):
    """CPU ms of one kind of process."""

    kind: str
    per_job_ms: float
    beyond_idle_ms: float
    """Per job, less what it uses in that time while there is nothing to do: a slow or crowded
    machine, on which a job takes longer, has a larger share of that."""
    idle_ms_per_s: float
    sleeps: float
    """Per job: how often a thread went to sleep and had to be woken again."""
    threads: dict[str, float]
    """Per job: main, python (other threads of ours), kafka (librdkafka's), dds, …"""
    functions: dict[str, float]
    """Per job, of threads that run Python: functions of ours with all they call, the most first."""


class Costs(msgspec.Struct, kw_only=True):
    """One workload on one broker."""

    total_ms: float
    records: dict[str, float]
    """Kafka records per job by topic."""
    kinds: list[Cost]


class Meter:
    """Watches one cluster: `start`, the workload, `stop`. Nothing else may run in it meanwhile."""

    def __init__(self, cluster: LocalCluster, samples: Path | None) -> None:
        """`samples`: $OUTRIDER_SAMPLES of the cluster's processes; None where they take none."""
        self._cluster = cluster
        self._samples = samples
        self._pids = _pids_by_kind(cluster)
        before, begun = self._read(), time.monotonic()
        time.sleep(IDLE_S)
        self._idle = _difference(before, self._read(), time.monotonic() - begun)
        self._before: dict[int, _Spent] = {}
        self._begun = 0.0
        self._records: dict[str, int] = {}

    def start(self) -> None:
        """The workload begins."""
        self._toggle_samplers()
        self._records = _records(self._cluster.settings)
        self._before, self._begun = self._read(), time.monotonic()

    def stop(self, jobs: int) -> Costs:
        """The workload of so many jobs is over."""
        spent = _difference(self._before, self._read(), jobs)
        job_s = (time.monotonic() - self._begun) / jobs
        self._toggle_samplers()
        records = _records(self._cluster.settings)
        kinds = []
        for kind, pids in self._pids.items():
            per_job_ms = sum(spent[pid].ms for pid in pids)
            idle_ms_per_s = sum(self._idle[pid].ms for pid in pids)
            cost = Cost(
                kind=kind,
                per_job_ms=per_job_ms,
                beyond_idle_ms=per_job_ms - idle_ms_per_s * job_s,
                idle_ms_per_s=idle_ms_per_s,
                sleeps=sum(spent[pid].sleeps for pid in pids),
                threads=_summed(spent[pid].threads for pid in pids),
                functions=_summed(self._functions(pid, jobs) for pid in pids),
            )
            kinds.append(cost)
        return Costs(
            total_ms=sum(cost.per_job_ms for cost in kinds),
            records={name: (end - self._records[name]) / jobs for name, end in records.items()},
            kinds=kinds,
        )

    def _read(self) -> dict[int, _Spent]:
        return {pid: _spent(pid) for pids in self._pids.values() for pid in pids}

    def _toggle_samplers(self) -> None:
        if self._samples is None:
            return
        for record in self._cluster.processes:
            if record.role != "broker" and record.identity is not None:
                send_signal(record.identity, SIGNAL)

    def _functions(self, pid: int, jobs: int) -> dict[str, float]:
        """What the sampler of this process found; empty where it has none."""
        if self._samples is None or pid not in self._sampled_pids():
            return {}
        deadline = time.monotonic() + SAMPLES_WAIT_S
        while time.monotonic() < deadline:
            found = list(self._samples.glob(f"*.{pid}.folded"))
            if found:
                return functions_of(found[0].read_text(), jobs)
            time.sleep(0.05)
        return {}

    def _sampled_pids(self) -> set[int]:
        return {
            record.identity.pid
            for record in self._cluster.processes
            if record.role != "broker" and record.identity is not None
        }


def functions_of(folded: str, jobs: int) -> dict[str, float]:
    """Folded stacks (µs) → ms per job by function of ours, callees included, each stack once.

    LOOP stands for what the event loop itself uses: system calls, wake-ups, its own bookkeeping.
    """
    found: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, spent_us = line.rpartition(" ")
        functions = stack.split(";")[1:]
        for function in set(functions):
            if function.startswith(OURS):
                found[function] += int(spent_us)
        if functions and functions[-1] == LOOP_FUNCTION:
            found[LOOP] += int(spent_us)
    return {name: us / 1000 / jobs for name, us in found.most_common()}


def show(costs: Costs, console: Console) -> None:
    """The tables of one broker."""
    table = Table(title=f"CPU ms per job: {costs.total_ms:.2f}")
    table.add_column("process")
    for column in ("per job", "beyond idle", "idle, ms/s", "sleeps", "per job by thread"):
        table.add_column(column, justify="right")
    for cost in costs.kinds:
        told = ", ".join(f"{name} {ms:.2f}" for name, ms in cost.threads.items() if ms >= 0.01)
        table.add_row(
            cost.kind, f"{cost.per_job_ms:.2f}", f"{cost.beyond_idle_ms:.2f}",
            f"{cost.idle_ms_per_s:.0f}", f"{cost.sleeps:.1f}", told,
        )  # fmt: skip
    console.print(table)
    told = ", ".join(f"{name} {count:.2f}" for name, count in costs.records.items())
    console.print(f"Kafka records per job: {told}")
    for cost in costs.kinds:
        if not cost.functions:
            continue
        table = Table(title=f"{cost.kind}: functions with what they call, CPU ms per job")
        table.add_column("function")
        table.add_column("ms", justify="right")
        for name, ms in list(cost.functions.items())[:FUNCTIONS_SHOWN]:
            table.add_row(name, f"{ms:.3f}")
        console.print(table)


def _pids_by_kind(cluster: LocalCluster) -> dict[str, tuple[int, ...]]:
    view = LedgerView(cluster.settings)
    view.advance()
    kinds: dict[str, list[int]] = {}
    for record in cluster.processes:
        if record.identity is None:
            continue
        pid = record.identity.pid
        role = str(record.role)
        if record.role == "coordinator":
            role = "leader" if record.name == view.leader else "standbys"
        kinds.setdefault(role, []).append(pid)
        if record.role == "agent":
            kinds.setdefault("launchers, jobs", []).extend(_children(pid))
    kinds["client"] = [os.getpid()]
    return {kind: tuple(pids) for kind, pids in kinds.items()}


def _children(pid: int) -> list[int]:
    """Processes whose parent this is now (proc(5), field 4 of `stat`)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            _, fields = _stat(folder / "stat")
            if fields and int(fields[1]) == pid:
                found.append(int(folder.name))
    return found


def _stat(path: Path) -> tuple[str, list[str]]:
    """Name, and the fields from the third on; nothing of a process that is gone."""
    try:
        head, _, tail = path.read_text().rpartition(")")
    except OSError:
        return "", []
    return head.partition("(")[2], tail.split()


def _spent(pid: int) -> _Spent:
    folder = Path("/proc") / str(pid)
    _, fields = _stat(folder / "stat")
    if not fields:
        return _Spent(0.0, 0.0, {}, 0)
    own, children = (sum(map(int, fields[at : at + 2])) * TICK_MS for at in (11, 13))
    threads, sleeps = {}, 0
    for task in (folder / "task").iterdir():
        name, mine = _stat(task / "stat")
        if mine:
            kind = "main" if task.name == str(pid) else _thread_kind(name)
            threads[task.name] = (kind, sum(map(int, mine[11:13])) * TICK_MS)
            sleeps += _sleeps(task / "status")
    return _Spent(own, children, threads, sleeps)


def _sleeps(path: Path) -> int:
    """Voluntary context switches (proc(5), `status`); 0 of a thread that is gone."""
    try:
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _thread_kind(name: str) -> str:
    return "kafka" if name.startswith("rdk:") else THREADS.get(name, name)


def _difference(
    before: dict[int, _Spent], after: dict[int, _Spent], share: float
) -> dict[int, _More]:
    """By process, per `share` (jobs or seconds)."""
    found = {}
    for pid, now in after.items():
        was = before[pid]
        children = (now.children_ms - was.children_ms) / share
        threads: dict[str, float] = {"children": children}
        for task, (kind, ms) in now.threads.items():
            more = (ms - was.threads.get(task, (kind, 0.0))[1]) / share
            threads[kind] = threads.get(kind, 0.0) + more
        own = (now.own_ms - was.own_ms) / share
        found[pid] = _More(own + children, threads, (now.sleeps - was.sleeps) / share)
    return found


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sums by key, the largest first."""
    whole: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = whole.get(key, 0.0) + value
    return dict(sorted(whole.items(), key=lambda item: -item[1]))


def _records(settings: ClusterSettings) -> dict[str, int]:
    names = TopicNames(settings.kafka.prefix)
    topics = {f"queue.{queue}": names.queue(queue) for queue in settings.queues}
    topics |= {
        "ledger": names.ledger(settings.pool), "results": names.results, "logs": names.logs,
        "payloads": names.payloads,
    }  # fmt: skip
    return {
        short: sum(end for _, end in watermarks(settings.kafka, topic).values())
        for short, topic in topics.items()
    }
