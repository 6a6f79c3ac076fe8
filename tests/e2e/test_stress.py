"""Many jobs on one agent, a third of them hostile: every good one gets its right result.

200 jobs by default; `make stress` runs 2,000. What each hostile one must come to is in HOSTILE.
"""

import hashlib
import os
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import pytest
from msgspec.structs import replace

from chaos.demo.leftovers import look
from chaos.demo.workload import FORK_BOMB, MEMORY_BOMB
from idl.ledger import NodeLost
from idl.records import Outcome
from idl.settings import NodeTiming
from node_agent.sandbox.settings import interpreter
from outrider.client.client import Client, Handle
from outrider.client.job import Job
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions
from tests.e2e.conftest import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]
JOBS: Final = int(os.environ.get("OUTRIDER_STRESS_JOBS", "200"))
WAIT_S: Final = 1_800.0
"""For one job: a deadline against hangs, not a measure."""
AGENT_GROWTH_KIB_MAX: Final = 64 * 1024
"""Of the agent's memory, whatever the number of jobs: output is capped, the ended are forgotten."""
SLEEPER: Final = "sleep 4249"
"""Nothing with these words may be left anywhere."""


class Hostile(NamedTuple):
    """One attack: how it must end. `python`: a program for the interpreter, else for sh."""

    program: str
    outcome: Outcome
    exit_code: int | None = None
    python: bool = False
    needs: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


_ZOMBIES: Final = """
import os, sys
for _ in range(20):
    if os.fork() == 0:
        os._exit(0)
sys.exit(9)
"""
_DESCRIPTORS: Final = """
import os, sys
try:
    while True: os.dup(0)
except OSError:
    sys.exit(9)
"""
HOSTILE: Final = {
    "fork-bomb": Hostile(FORK_BOMB, "succeeded", 0, True, "pids", {"pids": 30}),
    "memory-bomb": Hostile(MEMORY_BOMB, "out_of_memory", None, True, "memory"),
    "fills-tmp": Hostile(
        "head -c 9m /dev/zero > /tmp/f || exit 9", "failed", 9, options={"tmp": "2Mi"}
    ),
    "fills-inodes": Hostile(
        "n=0; while true > /tmp/$n; do n=$((n+1)); done; exit 9", "failed", 9,
        options={"tmp_inodes": 64},
    ),
    "opens-all": Hostile(_DESCRIPTORS, "failed", 9, True, options={"open_files": 32}),
    "floods": Hostile("head -c 8m /dev/zero; exit 9", "failed", 9, options={"log": "16Ki"}),
    "stops-itself": Hostile("kill -STOP $$", "timed_out", options={"timeout": "700ms"}),
    "hangs": Hostile(
        f"trap '' TERM; {SLEEPER}; {SLEEPER}", "timed_out", options={"timeout": "700ms"}
    ),
    "spins": Hostile("while :; do :; done", "timed_out", options={"timeout": "700ms"}),
    "daemonises": Hostile(
        f"trap '' TERM HUP; setsid sh -c '{SLEEPER} & {SLEEPER}' & exit 9", "failed", 9
    ),
    "zombie-farm": Hostile(_ZOMBIES, "failed", 9, True),
    "kills-all": Hostile("kill -KILL -1; exit 9", "failed", 9),
    "links-result": Hostile("ln -sf /etc/passwd $OUTRIDER_RESULT", "succeeded", 0),
    "segfaults": Hostile("kill -SEGV $$", "signalled"),
}  # fmt: skip


@contextmanager
def one_agent(folder: Path) -> Iterator[Cluster]:
    timing = NodeTiming(report_ms=500, heartbeat_ms=300, lost_ms=20_000, resend_ms=500)
    options = LocalOptions(
        name=f"stress-{os.getpid()}", folder=folder, coordinators=1, agents=1,
        tune=lambda found: replace(found, nodes=timing),
    )  # fmt: skip
    with LocalCluster.start(options) as local, Client(local.config_path) as client:
        yield Cluster(local, client)


def good(cluster: Cluster, number: int) -> tuple[Job, bytes]:
    """A job that computes, and what its result must be."""
    data = f"{number}:".encode() * (1 + number % 5_000)
    expected = hashlib.sha256(data).hexdigest().encode()
    script = "sha256sum | cut -c1-64 | tr -d '\\n' > $OUTRIDER_RESULT"
    return cluster.sh(script, id=f"good-{number}", payload=data, timeout="2m", cpu="100m"), expected


def hostile(cluster: Cluster, kind: str, number: int) -> Job:
    attack = HOSTILE[kind]
    program = (interpreter(), "-I", "-S", "-c") if attack.python else ("/bin/sh", "-c")
    options = {"retries": 0, "grace": "100ms", "timeout": "2m", "cpu": "100m", "memory": "32Mi",
               **attack.options}  # fmt: skip
    return cluster.job(*program, attack.program, id=f"{kind}-{number}", **options)


class Watcher:
    """Asks the agent for its metrics all the time, from a thread; notes its memory at its most."""

    def __init__(self, port: int, pid: int) -> None:
        self._url, self._pid = f"http://127.0.0.1:{port}/metrics", pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.answers = 0
        self.failures: list[str] = []
        self.before_kib = self.most_kib = self._memory_kib()

    def _memory_kib(self) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            try:
                with urllib.request.urlopen(self._url, timeout=30) as answer:
                    answer.read()
                self.answers += 1
                self.most_kib = max(self.most_kib, self._memory_kib())
            except (OSError, StopIteration) as error:
                self.failures.append(repr(error))

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def unlike(cluster: Cluster, kind: str, handle: Handle) -> str:
    """How a hostile job ended otherwise than it must, or ""."""
    attack = HOSTILE[kind]
    if attack.needs in cluster.unenforced():
        return ""
    handle.wait(WAIT_S)
    record = handle.attempt_result(WAIT_S)
    assert record is not None
    seen = (record.outcome, record.exit_code if attack.exit_code is not None else None)
    wrong = "" if seen == (attack.outcome, attack.exit_code) else f"{seen} {record.detail}"
    if kind == "links-result" and record.result:
        wrong = "it read a file of the host"
    return wrong and f"{record.job}: {wrong}, not {attack.outcome} {attack.exit_code}"


def left_running() -> list[str]:
    words = SLEEPER.replace(" ", "\0").encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue  # it ended while we looked
    return found


def losses(cluster: Cluster) -> list[str]:
    """Times that the leader gave the node up."""
    found: list[str] = []
    LedgerView(cluster.local.settings).advance(
        lambda _offset, entry, _verdict: found.extend(
            decision.reason for decision in entry.decisions if isinstance(decision, NodeLost)
        )
    )
    return found


def test_good_jobs_finish_beside_hostile_ones(tmp_path: Path) -> None:
    mark = f"stress-{os.getpid()}"
    before = look(mark)
    with one_agent(tmp_path / "cluster") as cluster:
        (node,) = cluster.view().state.nodes
        agent = cluster.local.run.process(node)
        assert agent.identity is not None
        kinds = sorted(HOSTILE)
        expected: dict[str, bytes] = {}
        jobs: list[Job] = []
        for number in range(JOBS):
            if number % 3:
                job, expected[f"good-{number}"] = good(cluster, number)
            else:
                job = hostile(cluster, kinds[number // 3 % len(kinds)], number)
            jobs.append(job)
        with Watcher(agent.metrics_port, agent.identity.pid) as watcher:
            submitted = cluster.client.submit(jobs)
            handles = {job.id: handle for job, handle in zip(jobs, submitted, strict=True)}
            wrong = [
                name for name, right in expected.items() if handles[name].result(WAIT_S) != right
            ]
            others = [name for name in handles if name not in expected]
            unexpected = [unlike(cluster, n.rpartition("-")[0], handles[n]) for n in others]
        retried = Counter(
            attempt.outcome
            for name in expected
            for attempt in handles[name].status().attempts
            if attempt.outcome != "succeeded"
        )
        assert wrong == []
        assert [words for words in unexpected if words] == []
        assert retried == Counter(), "a good job was hit by its neighbours"
        assert losses(cluster) == [] and watcher.failures == [] and watcher.answers > 0
        assert watcher.most_kib - watcher.before_kib < AGENT_GROWTH_KIB_MAX
        assert left_running() == []
    assert type(before).new(before, look(mark)) == []
