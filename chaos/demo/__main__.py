"""The demo: up, submit, kill the leader, wait, account. Exit 0 only if the account is clean."""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from chaos.demo.account import Account, check, settle
from chaos.demo.leftovers import Leftovers, look
from chaos.demo.workload import (
    FILES_DEFAULT,
    POISON,
    Case,
    hostile_cases,
    library_files,
    library_jobs,
)
from chaos.sweep import FOLDER_PREFIX, mark_owner
from dataplane.ledger import LedgerReader
from dataplane.producer import RecordProducer
from dataplane.tail import scan
from idl.codec import JSON, decode
from idl.errors import OutriderError, PlatformFaultError
from idl.ids import QueueName
from idl.jobs import LimitName, SourceRef
from idl.ledger import Cancelled, DeadLettered, Finished, LedgerEntry, NodeSeen, TermStarted
from idl.records import AttemptResult
from idl.settings import ClusterSettings
from idl.topics import TopicNames
from idl.units import format_bytes, format_ms
from outrider.client.client import Client
from outrider.client.job import ALL_LIMITS
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.record import layout

QUEUE: Final = QueueName("default")
KILL_AFTER_SHARE: Final = 0.3
"""The leader dies once this share of the jobs has ended: work is queued, placed and running."""
STALLED_AFTER_S: Final = 120.0
"""No job ended for so long: something hangs, say what is missing and fail."""
POLL_S: Final = 0.2
REPORT_EVERY_S: Final = 3.0


class Observer:
    """Tails the ledger from outside, as any reader may, and remembers when each entry arrived."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._lock = threading.Lock()
        self._entries: list[tuple[int, LedgerEntry]] = []
        self._arrived_ms: list[float] = []
        self._ended: set[str] = set()
        self.enforced: frozenset[LimitName] = frozenset()
        self.leader = ""
        self._reader = LedgerReader(
            settings.kafka, settings.pool, 0, self._take, unacknowledged_max=1_000_000
        )
        self._reader.start()

    def _take(self, batch: list[tuple[int, LedgerEntry]]) -> None:
        now = time.time() * 1000
        with self._lock:
            for offset, entry in batch:
                self._entries.append((offset, entry))
                self._arrived_ms.append(now)
                for decision in entry.decisions:
                    self._note(entry, decision)

    def _note(self, entry: LedgerEntry, decision: object) -> None:
        match decision:
            case TermStarted():
                self.leader = entry.leader
            case NodeSeen(enforces=enforces):
                self.enforced = frozenset(enforces)
            case Finished(job=job) | DeadLettered(job=job) | Cancelled(job=job):
                self._ended.add(job)
            case _:
                pass

    @property
    def ended(self) -> set[str]:
        """Jobs with an end in the ledger (validity is judged later, by the account)."""
        with self._lock:
            return set(self._ended)

    def entries(self) -> list[tuple[int, LedgerEntry]]:
        """Everything read so far."""
        with self._lock:
            return list(self._entries)

    def first_after(self, killed_ms: float, old_leader: str) -> tuple[float | None, float | None]:
        """ms from the kill to (the next leader's term, its first decision), as read back here."""
        term = decision = None
        with self._lock:
            for (_, entry), arrived in zip(self._entries, self._arrived_ms, strict=True):
                if entry.leader == old_leader or arrived < killed_ms:
                    continue
                if term is None and isinstance(entry.decisions[0], TermStarted):
                    term = arrived - killed_ms
                if decision is None and not isinstance(entry.decisions[-1], TermStarted):
                    decision = arrived - killed_ms
        return term, decision

    def close(self) -> None:
        """Stops reading."""
        self._reader.close()


class Report(msgspec.Struct, kw_only=True):
    """What `--json` prints."""

    kafka: str
    mode: str
    submitted: int
    ended: dict[str, int]
    retries: int
    rejected: int
    terms: int
    void_entries: int
    killed_leader: str
    next_term_ms: float | None
    next_decision_ms: float | None
    run_s: float
    problems: list[str]
    library: dict[str, Any]


def _submit(
    cluster: LocalCluster, observer: Observer, files: int, say: Callable[[str], None]
) -> tuple[list[Case], dict[str, str]]:
    """Submits everything; returns the hostile cases and every job's expected end."""
    settings = cluster.settings
    unenforced = tuple(name for name in ALL_LIMITS if name not in observer.enforced)
    if unenforced:
        say(f"nodes here cannot enforce {', '.join(unenforced)}: jobs that need them are refused")
    jobs = library_jobs(library_files(files), unenforced, settings.cluster)
    port = int(settings.kafka.bootstrap.split(",")[0].rpartition(":")[2])
    cases = hostile_cases(unenforced, settings.cluster, port, Path(settings.secret_file))
    expected = {job.id: "finished" for job in jobs}
    for case in cases:
        refused = set(case.refused_without) & set(unenforced)
        expected[case.job.id] = "dead-lettered" if refused else case.expected
    half = len(jobs) // 2
    with Client(cluster.config_path) as client:
        client.submit(jobs[:half])
        client.submit([case.job for case in cases])
        client.submit(jobs[half:])
    producer = RecordProducer(settings.kafka, name="poison")
    producer.send(TopicNames(settings.kafka.prefix).queue(QUEUE), POISON, content_type=JSON)
    producer.close()
    return cases, expected


def _wait_and_kill(
    cluster: LocalCluster, observer: Observer, expected: dict[str, str], say: Callable[[str], None]
) -> tuple[str, float]:
    """Waits for every end; kills the leader on the way. Returns (its name, when in epoch ms)."""
    killed, killed_ms = "", 0.0
    said = moved = time.monotonic()
    count = -1
    while True:
        ended = observer.ended & expected.keys()
        if len(ended) != count:
            count, moved = len(ended), time.monotonic()
        if not killed and count >= KILL_AFTER_SHARE * len(expected):
            killed, killed_ms = observer.leader, time.time() * 1000
            cluster.kill(killed, signal.SIGKILL)
            say(f"killed the leader, {killed}, with SIGKILL after {count} jobs")
        if count == len(expected) and killed:
            return killed, killed_ms
        if time.monotonic() - moved > STALLED_AFTER_S:
            missing = ", ".join(sorted(expected.keys() - ended)[:5])
            raise PlatformFaultError(
                f"no job ended for {STALLED_AFTER_S:.0f} s; missing e.g. {missing}; "
                f"logs are in {cluster.place.logs}"
            )
        if time.monotonic() - said > REPORT_EVERY_S:
            said = time.monotonic()
            say(f"{count} of {len(expected)} jobs ended, leader {observer.leader}")
        time.sleep(POLL_S)


def _accepted_results(settings: ClusterSettings, account: Account) -> dict[str, AttemptResult]:
    """The one accepted result of each job."""
    topic = TopicNames(settings.kafka.prefix).results
    by_place = {
        SourceRef(topic=r.topic, partition=r.partition, offset=r.offset): r.value
        for r in scan(settings.kafka, topic)
    }
    return {
        job.job: decode(by_place[job.accepted[0]], AttemptResult)
        for job in account.jobs.values()
        if job.accepted
    }


def _library(results: dict[str, AttemptResult]) -> dict[str, Any]:
    """The jobs' reports, merged."""
    reports = [
        json.loads(result.result)
        for job, result in results.items()
        if job.startswith("stdlib-") and result.result
    ]
    imports: Counter[str] = Counter()
    for report in reports:
        imports.update(report["imports"].keys())
    hardest = sorted(reports, key=lambda r: (-r["complexity"], r["file"]))[:5]
    totals = {
        key: sum(report[key] for report in reports)
        for key in ("lines", "functions", "classes", "bytecode")
    }
    return {
        "files": len(reports),
        **totals,
        "most_imported": imports.most_common(8),
        "hardest": [(r["complexity"], r["hardest"], r["file"]) for r in hardest],
    }


def _show_library(console: Console, library: dict[str, Any]) -> None:
    table = Table(title="The standard library, as the jobs saw it", title_justify="left")
    table.add_column("what")
    table.add_column("value")
    for key in ("files", "lines", "functions", "classes"):
        table.add_row(key, f"{library[key]:,}")
    table.add_row("bytecode", format_bytes(library["bytecode"]))
    table.add_row("imported by most", ", ".join(f"{n} ({c})" for n, c in library["most_imported"]))
    for complexity, name, file in library["hardest"]:
        table.add_row("most branches", f"{complexity} in {name}() of {file}")
    console.print(table)


def _show_account(
    console: Console,
    account: Account,
    cases: list[Case],
    expected: dict[str, str],
    results: dict[str, AttemptResult],
) -> None:
    table = Table(title="What became of every submission", title_justify="left")
    for column in ("submission", "jobs", "ended as", "attempts", "how"):
        table.add_column(column)
    library = [job for name, job in account.jobs.items() if name.startswith("stdlib-")]
    ends = Counter(end for job in library for end in job.ends)
    told = ", ".join(f"{count} {end}" for end, count in ends.items())
    table.add_row("stdlib files", str(len(library)), told, str(sum(j.attempts for j in library)),
                  f"{sum(j.retries for j in library)} retries")  # fmt: skip
    for case in cases:
        job = account.jobs.get(case.job.id)
        if job is None:
            table.add_row(case.kind, "1", "[red]lost[/red]", "", "")
            continue
        result = results.get(job.job)
        how = job.end_detail or (result.result or b"").decode(errors="replace") if result else ""
        table.add_row(case.kind, "1", ", ".join(job.ends), str(job.attempts), how or job.end_detail)
    for rejected in account.rejected:
        table.add_row("poisoned record", "1", "rejected", "0",
                      f"{rejected.code}: {rejected.reason}")  # fmt: skip
    console.print(table)
    total = len(expected) + 1
    console.print(f"{total} submissions, {len(account.jobs)} jobs and "
                  f"{len(account.rejected)} rejection in the ledger")  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Report:
    """The whole demo. Raises OutriderError where it could not be carried through."""
    begun = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun:6.1f}s[/dim] {line}", highlight=False)

    name = f"demo-{os.getpid()}"
    before = look(name)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{name}-"))
    mark_owner(folder)
    local = LocalOptions(name=name, folder=folder, kafka=options.kafka, prefix=f"{folder.name}.")
    try:
        with LocalCluster.start(local, say) as cluster:
            report = _demo(cluster, options, console, say)
        report.run_s = round(time.monotonic() - begun, 1)
    except KeyboardInterrupt:
        _remove(name, folder, say)
        raise
    finally:
        after = look(name)
    report.problems += Leftovers.new(before, after)
    if not report.problems:
        LocalCluster.purge(cluster.place)
    else:
        say(f"logs and state are kept in {folder}")
    return report


def _remove(name: str, folder: Path, say: Callable[[str], None]) -> None:
    """Whatever there is of the cluster when somebody interrupts."""
    cluster = LocalCluster.attach(name, folder)
    if cluster is not None:
        cluster.stop(say)
    LocalCluster.purge(layout(name, folder))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, and a second signal does not disturb the cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    kept = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _demo(
    cluster: LocalCluster, options: argparse.Namespace, console: Console, say: Callable[[str], None]
) -> Report:
    observer = Observer(cluster.settings)
    try:
        while not observer.enforced:
            time.sleep(POLL_S)
        cases, expected = _submit(cluster, observer, options.files, say)
        say(f"submitted {len(expected)} jobs and one poisoned record")
        killed, killed_ms = _wait_and_kill(cluster, observer, expected, say)
        say("every job ended")
    finally:
        observer.close()
    account = settle(observer.entries())
    problems = check(account, expected)
    if [r.code for r in account.rejected] != ["not-utf8-json"]:
        problems.append(f"poisoned record: {len(account.rejected)} rejections instead of one")
    results = _accepted_results(cluster.settings, account)
    library = _library(results)
    if library["files"] != sum(1 for job in expected if job.startswith("stdlib-")):
        problems.append(f"only {library['files']} reports came back")
    _show_library(console, library)
    _show_account(console, account, cases, expected, results)
    term_ms, decision_ms = observer.first_after(killed_ms, killed)
    if decision_ms is None or term_ms is None:
        problems.append("no leader decided anything after the kill")
    else:
        console.print(
            f"leader {killed} killed: next term in the ledger after {format_ms(term_ms)}, "
            f"next decision after {format_ms(decision_ms)}; "
            f"terms {', '.join(f'{term} {leader}' for term, leader, _ in account.terms)}"
        )
    return Report(
        kafka=options.kafka,
        mode="root" if os.geteuid() == 0 else "ordinary user",
        submitted=len(expected) + 1,
        ended=dict(Counter(end for job in account.jobs.values() for end in job.ends)),
        retries=sum(job.retries for job in account.jobs.values()),
        rejected=len(account.rejected),
        terms=len(account.terms),
        void_entries=account.void.total(),
        killed_leader=killed,
        next_term_ms=term_ms,
        next_decision_ms=decision_ms,
        run_s=0.0,
        problems=problems,
        library=library,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 clean account, 1 something lost, doubled or left, 2 could not run, 130
    interrupted."""
    parser = argparse.ArgumentParser(prog="python -m chaos.demo", description=__doc__)
    parser.add_argument("--kafka", default="embedded", help="embedded, apache or HOST:PORT,…")
    parser.add_argument("--files", type=int, default=FILES_DEFAULT, help="library files to take")
    parser.add_argument("--json", action="store_true", help="report as JSON on stdout")
    options = parser.parse_args(argv)
    console = Console(stderr=options.json)
    try:
        with _interruptible():
            report = run(options, console)
    except OutriderError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted; its cluster is stopped and removed\n")
        return 130
    if options.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    for problem in report.problems:
        console.print(f"[red]PROBLEM[/red] {problem}", highlight=False)
    if report.problems:
        console.print(f"demo FAILED: {len(report.problems)} problems, {report.run_s} s")
        return 1
    console.print(
        f"demo passed on {report.kafka} as {report.mode} in {report.run_s} s: "
        "nothing lost, nothing doubled, nothing left behind"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
