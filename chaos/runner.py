"""A run: start a cluster, load it, break it, heal it, let it settle, read everything, judge.

Whatever happens (Ctrl-C too), what was broken is healed and what was started is stopped.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from chaos import generator, nemesis
from chaos.breaker import Breaker
from chaos.demo.leftovers import Leftovers, look
from chaos.faults import network
from chaos.faults.network import NamespacedBroker, Network
from chaos.faults.world import World
from chaos.history import (
    Audited,
    FaultSkipped,
    Hashed,
    History,
    Left,
    Phase,
    Recorder,
    ResultFound,
    RunStarted,
)
from chaos.load import Load
from chaos.observer import Observer
from chaos.scenario import Scenario
from chaos.sweep import FOLDER_PREFIX, mark_owner
from dataplane.tail import scan
from idl.codec import decode
from idl.errors import ConfigError, InvalidRecordError, OutriderError
from idl.jobs import LimitName, SourceRef
from idl.records import AttemptResult
from idl.settings import ClusterSettings, NodeTiming
from idl.topics import TopicNames
from idl.units import parse_ms
from outrider.client.job import ALL_LIMITS
from outrider.client.view import LedgerView
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.process import Identity

Say = Callable[[str], None]
HISTORY_FILE: Final = "history.jsonl"
POLL_S: Final = 0.2
PROGRESS_S: Final = 5.0
NODES_SEEN_S: Final = 20.0
CATCH_UP_S: Final = 10.0


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a person asked for. `cluster`: an existing one, `pids` of it may be paused."""

    scenario: Scenario
    minutes: float
    seed: int
    report: Path
    cluster: ClusterSettings | None = None
    pids: dict[str, Identity] = {}


def _names(letter: str, count: int) -> tuple[str, ...]:
    """As LocalCluster names them: c1 c2 …, n1 n2 …."""
    return tuple(f"{letter}{index + 1}" for index in range(count))


def _now_ms() -> float:
    return time.time_ns() / 1e6


def run(options: RunOptions, say: Say) -> History:
    """The whole run; the history is also in `report/history.jsonl`.

    Raises OutriderError where it could not be carried out (nothing is left behind then either).
    """
    options.report.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(options.report / HISTORY_FILE, _now_ms)
    stopping = threading.Event()
    name = f"chaos-{os.getpid()}"
    mounted = f"{network.own_prefix()}-"
    before = look(name, mounted)
    ours = options.cluster is None
    try:
        with _interruptible(stopping, say), ExitStack() as stack:
            world, settings = _own(options, name, stack, say) if ours else _somebodys(options)
            _carry_out(options, world, settings, recorder, stopping, say)
        if ours:
            recorder.add(Phase(at_ms=_now_ms(), name="stopped"))
            for line in Leftovers.new(before, look(name, mounted)):
                recorder.add(Left(at_ms=_now_ms(), what=line))
    finally:
        recorder.close()
    return recorder.history()


@contextmanager
def _interruptible(stopping: threading.Event, say: Say) -> Iterator[None]:
    """SIGINT and SIGTERM end the load early; a second one is not listened to: healing goes on."""

    def ask(number: int, _frame: object) -> None:
        say(f"{signal.Signals(number).name}: healing and cleaning up")
        stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


# -- the cluster -------------------------------------------------------------------------------


def _own(
    options: RunOptions, name: str, stack: ExitStack, say: Say
) -> tuple[World, ClusterSettings]:
    shape = options.scenario.cluster
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{name}-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    mark_owner(folder)
    kinds = {spec.fault for spec in options.scenario.nemesis}
    world = World(
        folder=folder,
        coordinators=_names("c", shape.coordinators),
        agents=_names("n", shape.agents),
        skewed="clock_jump" in kinds,
    )
    kafka: str = shape.kafka
    if shape.network == "namespaces":
        reason = network.unavailable()
        if reason:
            raise ConfigError(f"this scenario cannot run here: {reason}")
        say("building the network of namespaces")
        world.network = Network(world.coordinators, world.agents)
        stack.callback(world.network.down)
        world.network.up()
        broker = NamespacedBroker(folder / "namespaced-broker", world.network)
        stack.callback(broker.stop)
        broker.start(say)
        kafka = broker.bootstrap
    if "disk_full" in kinds and os.geteuid() == 0:
        stack.callback(world.unmount_disk)
        world.mount_disk(folder / "state")
    local = LocalOptions(
        name=name, folder=folder, kafka=kafka, coordinators=shape.coordinators,
        agents=shape.agents, overcommit=shape.overcommit, placed=world.placement,
        tune=lambda settings: _tuned(settings, options.scenario, world.network),
    )  # fmt: skip
    cluster = stack.enter_context(_started(local, options, say))
    world.cluster = cluster
    return world, cluster.settings


def _tuned(settings: ClusterSettings, scenario: Scenario, net: Network | None) -> ClusterSettings:
    timing = NodeTiming(
        report_ms=500, heartbeat_ms=300, lost_ms=parse_ms(scenario.cluster.node_lost),
        resend_ms=200,
    )  # fmt: skip
    settings = msgspec.structs.replace(settings, nodes=timing)
    if net is None:
        return settings
    members = tuple(
        msgspec.structs.replace(peer, address=net.address(peer.name))
        for peer in settings.coordinators
    )
    return msgspec.structs.replace(
        settings,
        coordinators=members,
        kafka=msgspec.structs.replace(settings.kafka, kind="embedded"),
        dds=msgspec.structs.replace(settings.dds, interface=network.INTERFACE),
    )


@contextmanager
def _started(local: LocalOptions, options: RunOptions, say: Say) -> Iterator[LocalCluster]:
    """The cluster; its logs are moved to the report when it is stopped."""
    cluster = LocalCluster.start(local, say)
    try:
        yield cluster
    finally:
        for note in cluster.stop(say):
            say(note)
        for source in (cluster.place.logs, cluster.place.broker):
            _keep_logs(source, options.report / "logs")


def _keep_logs(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for log in source.glob("*.log"):
        (target / log.name).write_bytes(log.read_bytes())


def _somebodys(options: RunOptions) -> tuple[World, ClusterSettings]:
    settings = options.cluster
    assert settings is not None
    members = {peer.name for peer in settings.coordinators}
    world = World(
        folder=options.report,
        coordinators=tuple(name for name in options.pids if name in members),
        agents=tuple(name for name in options.pids if name not in members),
        pids=options.pids,
    )
    return world, settings


# -- the run -----------------------------------------------------------------------------------


def _carry_out(
    options: RunOptions,
    world: World,
    settings: ClusterSettings,
    recorder: Recorder,
    stopping: threading.Event,
    say: Say,
) -> None:
    scenario, duration_s = options.scenario, options.minutes * 60
    recorder.add(
        RunStarted(
            at_ms=_now_ms(), scenario=scenario.name, seed=options.seed, minutes=options.minutes,
            processes=(*world.coordinators, *world.agents), strangers=world.cluster is None,
            checkers=scenario.checkers,
        )
    )  # fmt: skip
    observer = Observer(settings, recorder)
    try:
        world.leader = lambda: observer.leader
        unenforced = _unenforced(observer, say)
        tag = f"ch{time.time_ns() // 1_000_000_000:x}"
        load = Load(settings, tag, scenario.generator, unenforced, recorder)
        breaker = Breaker(world, recorder)
        plan = generator.plan(scenario, options.seed, duration_s)
        faults = nemesis.plan(scenario, options.seed, duration_s)
        say(f"{len(plan)} submissions and {len(faults)} faults planned from seed {options.seed}")
        recorder.add(Phase(at_ms=_now_ms(), name="load"))
        threads = (
            threading.Thread(target=load.run, args=(plan,), name="load"),
            threading.Thread(target=breaker.run, args=(faults, duration_s), name="breaker"),
        )
        try:
            for thread in threads:
                thread.start()
            _watch(threads, load, breaker, observer, stopping, say)
        finally:
            load.stop()
            breaker.stop()
            for thread in threads:
                thread.join()
        if stopping.is_set():
            recorder.add(Phase(at_ms=_now_ms(), name="interrupted"))
        unhealed = "; ".join(breaker.unhealed)
        recorder.add(Phase(at_ms=_now_ms(), name="healed", detail=unhealed))
        say(f"NOT healed: {unhealed}" if unhealed else "everything is healed")
        say("waiting for answers and for the last jobs")
        load.close()
        _settle(scenario, load, breaker, observer, recorder, say)
        _read_all(settings, observer, recorder, tag, say)
        recorder.add(_audited(settings, options.report))
    finally:
        observer.close()


def _unenforced(observer: Observer, say: Say) -> tuple[LimitName, ...]:
    deadline = time.monotonic() + NODES_SEEN_S
    while not observer.enforced() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    missing = tuple(name for name in ALL_LIMITS if name not in observer.enforced())
    if missing:
        say(f"nodes here cannot enforce {', '.join(missing)}: jobs do without")
    return missing


def _watch(
    threads: tuple[threading.Thread, ...],
    load: Load,
    breaker: Breaker,
    observer: Observer,
    stopping: threading.Event,
    say: Say,
) -> None:
    said = time.monotonic()
    while any(thread.is_alive() for thread in threads) and not stopping.wait(POLL_S):
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            broken = ", ".join(breaker.open) or "nothing"
            say(
                f"asked {load.asked}, accepted {len(load.accepted())}, ended "
                f"{len(observer.ended())}, live {observer.live}; term {observer.term} led by "
                f"{observer.leader}; {breaker.began} faults, broken now: {broken}"
            )


def _settle(
    scenario: Scenario,
    load: Load,
    breaker: Breaker,
    observer: Observer,
    recorder: Recorder,
    say: Say,
) -> None:
    """Waits until all that was accepted has ended, and all else is refused, at most `settle`."""
    deadline = time.monotonic() + parse_ms(scenario.settle) / 1000
    while True:
        breaker.look()
        missing = load.accepted() - observer.ended()
        undecided = load.acknowledged() - observer.decided()
        if observer.broken or not (missing or undecided) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    detail = f"{len(missing)} jobs have not ended, e.g. {min(missing)}" if missing else ""
    if undecided:
        detail += f"{'; ' if detail else ''}{len(undecided)} records were not decided on"
    say(detail or "every accepted job has ended")
    recorder.add(Phase(at_ms=_now_ms(), name="settled", detail=detail))


# -- reading everything --------------------------------------------------------------------------


def _read_all(
    settings: ClusterSettings, observer: Observer, recorder: Recorder, tag: str, say: Say
) -> None:
    """The state as a fresh reader finds it, and every result."""
    observer.hash_now()
    try:
        fresh = LedgerView(settings)
        fresh.advance()
        found = Hashed(at_ms=_now_ms(), by="fresh reader", next_offset=fresh.state.next_offset,
                       state_hash=fresh.state.state_hash())  # fmt: skip
        deadline = time.monotonic() + CATCH_UP_S
        while observer.next_offset < found.next_offset and time.monotonic() < deadline:
            time.sleep(POLL_S)
        recorder.add(found)
        topic = TopicNames(settings.kafka.prefix).results
        for record in scan(settings.kafka, topic):
            if (record.key or b"").startswith(tag.encode()):
                where = SourceRef(
                    topic=record.topic, partition=record.partition, offset=record.offset
                )
                recorder.add(_result(where, record.value or b""))
    except OutriderError as error:
        say(f"reading the ledger again: {error}")
        recorder.add(FaultSkipped(at_ms=_now_ms(), kind="read", reason=str(error)))


def _audited(settings: ClusterSettings, report: Path) -> Audited:
    """`outrider audit` in a process of its own, told where Kafka is and nothing else of the run."""
    cluster_file = report / "audit-cluster.json"
    cluster_file.write_bytes(msgspec.json.encode(settings))
    command = [sys.executable, "-m", "outrider", "audit", "--json", "--config", str(cluster_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (report / "audit.json").write_text(done.stdout)
    if done.returncode:
        return Audited(
            at_ms=_now_ms(), exit_code=done.returncode, message=done.stderr.strip()[-500:]
        )
    return Audited(at_ms=_now_ms(), exit_code=0, entries=json.loads(done.stdout)["entries"])


def _result(where: SourceRef, value: bytes) -> ResultFound:
    try:
        result = decode(value, AttemptResult)
    except InvalidRecordError as error:
        return ResultFound(at_ms=_now_ms(), source=where, unreadable=str(error))
    return ResultFound(
        at_ms=_now_ms(), source=where, job=result.job, attempt=result.attempt, node=result.node,
        outcome=result.outcome, started_ms=result.started_ms, ended_ms=result.ended_ms,
        sha256=hashlib.sha256(result.result or b"").hexdigest(),
    )  # fmt: skip
