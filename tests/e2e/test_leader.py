"""The lead on real processes: handed over, taken over, told why; snapshots written and used."""

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.failover import Load
from dataplane.ledger import read_ledger
from dataplane.snapshots import newest_head
from idl.ledger import TermStarted
from idl.settings import ClusterSettings, ElectionSettings, SnapshotSettings
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions
from tests.e2e.conftest import answer_of, hand_over, wait_until
from tests.integration.conftest import require_apache

pytestmark = pytest.mark.timeout(240)

SNAPSHOT_EVERY = 1_000
WAIT_S = 30
SNAPSHOT_WAIT_S = 120
"""For a thousand entries, and a writer that runs when nobody else does."""


def _often(settings: ClusterSettings) -> ClusterSettings:
    return replace(settings, snapshots=SnapshotSettings(every_entries=SNAPSHOT_EVERY))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("leader")
    options = LocalOptions(name=f"leader-{folder.name}", folder=folder, tune=_often)
    with LocalCluster.start(options) as local:
        load = Load(local.settings)
        try:
            yield local
        finally:
            load.close()


outrider = partial(answer_of, wait_s=WAIT_S)


def leads(cluster: LocalCluster) -> tuple[str, int]:
    view = LedgerView(cluster.settings)
    view.advance()
    return view.leader, view.state.term


def led_after(cluster: LocalCluster, term: int) -> tuple[str, int]:
    """The next leader and its term, which votes that split may have made a later one."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        leader, now = leads(cluster)
        if now > term:
            return leader, now
        time.sleep(0.1)
    raise AssertionError("nobody took over")


def decides(cluster: LocalCluster, term: int) -> bool:
    """Whether this term has decided more than that it began."""
    return any(
        entry.term == term and not isinstance(entry.decisions[-1], TermStarted)
        for _, entry in read_ledger(cluster.settings.kafka, cluster.settings.pool)
    )


def test_the_lead_goes_to_whom_the_operator_names(cluster: LocalCluster) -> None:
    for _ in range(3):
        leader, _ = leads(cluster)
        successor = next(name for name in ("c3", "c2", "c1") if name != leader)
        answer = hand_over(cluster.config_path, successor, WAIT_S)
        assert answer["leader"] == successor
        term = answer["term"]
        wait_until(partial(decides, cluster, term), "the successor decides nothing", WAIT_S)
        terms = outrider(cluster, "leader")["terms"]
        before = [row for row in terms if row["term"] < term][-1]
        assert before["leader"] == answer["from"]
        assert before["ended"].startswith(f"{answer['from']} stepped down: transfer ordered")
    leader, _ = leads(cluster)
    assert f"{leader} leads already" in outrider(
        cluster, "leader", "transfer", "--to", leader, code=1
    )
    assert "not in the cluster file" in outrider(
        cluster, "leader", "transfer", "--to", "c9", code=2
    )


def test_the_history_says_why_each_term_ended(cluster: LocalCluster) -> None:
    first, one = leads(cluster)
    cluster.kill(first, signal.SIGTERM)
    second, two = led_after(cluster, one)
    cluster.restart(first)
    time.sleep(2)
    cluster.kill(second, signal.SIGKILL)
    third, three = led_after(cluster, two)
    cluster.restart(second)
    time.sleep(2)
    cluster.kill(third, signal.SIGSTOP)
    fourth, four = led_after(cluster, three)
    cluster.kill(third, signal.SIGCONT)
    terms = {row["term"]: row for row in outrider(cluster, "leader")["terms"]}
    assert terms[one]["ended"] == f"{first} stepped down: shutdown"
    assert terms[two]["ended"] == f"the process of {second} is gone"
    assert terms[three]["ended"] == f"{third} was not heard"
    led = [terms[term]["leader"] for term in (one, two, three, four)]
    assert led == [first, second, third, fourth]
    newest = terms[max(terms)]
    assert newest["ended_ms"] is None and newest["ended"] == ""


def test_a_coordinator_starts_from_a_snapshot_and_agrees_with_the_leader(
    cluster: LocalCluster,
) -> None:
    deadline = time.monotonic() + SNAPSHOT_WAIT_S
    while newest_head(cluster.settings.kafka, cluster.settings.pool) is None:
        assert time.monotonic() < deadline, "no snapshot was written"
        time.sleep(0.5)
    leader, _ = leads(cluster)
    standby = next(name for name in ("c1", "c2", "c3") if name != leader)
    cluster.restart(standby)
    log = Path(cluster.run.process(standby).log)
    while "recovered from a snapshot" not in log.read_text():
        assert time.monotonic() < deadline + WAIT_S, "the snapshot was not used"
        time.sleep(0.2)
    time.sleep(2)
    assert "state differs" not in log.read_text()
    audit = outrider(cluster, "audit")
    assert audit["ok"] and audit["snapshot_matches"] is not False
    fast = outrider(cluster, "audit", "--from-snapshot")
    assert fast["ok"] and fast["from_offset"] >= SNAPSHOT_EVERY


STALL_S = 5.0


def _patiently(settings: ClusterSettings) -> ClusterSettings:
    """A busy machine must not depose a leader here: this is about Kafka."""
    return replace(settings, election=ElectionSettings(heartbeat_ms=200, timeout_ms=4_000))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", pytest.param("apache", marks=pytest.mark.apache)])
def test_a_stalled_kafka_is_shown_and_deposes_nobody(kind: str, tmp_path: Path) -> None:
    if kind == "apache":
        require_apache()
    options = LocalOptions(
        name=f"stall-{kind}", folder=tmp_path / "cluster", kafka=kind, tune=_patiently
    )
    with LocalCluster.start(options) as local:
        load = Load(local.settings)
        try:
            time.sleep(3)
            before = leads(local)
            brokers = [r for r in local.run.processes if r.role == "broker"]
            for record in brokers:
                local.kill(record.name, signal.SIGSTOP)
            try:
                time.sleep(STALL_S)
                wait_until(lambda: stalled(local), "the stall is not told", WAIT_S)
            finally:
                for record in brokers:
                    local.kill(record.name, signal.SIGCONT)
            wait_until(lambda: well(local), "it did not end by itself", WAIT_S)
            wait_until(lambda: gap_of_decisions_ms(local) >= STALL_S * 900,
                       "it decided meanwhile, or never again", WAIT_S)  # fmt: skip
        finally:
            load.close()
        assert leads(local) == before, "nobody resigned, nobody stood"
        wait_until(lambda: outrider(local, "audit")["live"] == 0, "jobs do not end", WAIT_S)
        audit = outrider(local, "audit")
        assert audit["ok"] and audit["attempts"] == audit["accepted"], "nothing was placed twice"


def status(cluster: LocalCluster) -> "subprocess.CompletedProcess[str]":
    """`outrider status`; a broker that wakes up may answer it late."""
    return subprocess.run(
        [sys.executable, "-m", "outrider.cli.main", "status", "--json",
         "--config", str(cluster.config_path)],
        capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip


def stalled(cluster: LocalCluster) -> bool:
    """Nobody answers, and one line says since when."""
    done = status(cluster)
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1, done.stderr
    return "Kafka stalled since" in done.stderr


def well(cluster: LocalCluster) -> bool:
    """Kafka takes appends, as the leader has it."""
    done = status(cluster)
    return done.returncode == 0 and bool(json.loads(done.stdout)["kafka"]["state"] == "ok")


def gap_of_decisions_ms(cluster: LocalCluster) -> int:
    """The longest time between two entries of the ledger."""
    times = [e.at_ms for _, e in read_ledger(cluster.settings.kafka, cluster.settings.pool)]
    return max(after - before for before, after in itertools.pairwise(times))
