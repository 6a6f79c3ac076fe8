"""`LocalCluster`: broker, coordinators and agents of one machine as detached processes.

The order is that of need: broker, topics, coordinators, agents; `stop` goes the other way.
Whatever fails on the way up stops everything that was started.
"""

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from dataplane.broker import Broker, attach_broker, open_broker
from dataplane.topics import ensure_topics
from idl.errors import ConfigError, PlatformFaultError
from idl.ids import CoordinatorId, QueueName, is_valid_name
from idl.keys import new_private_key
from idl.members import CoordinatorPeer
from idl.settings import (
    ClusterSettings,
    DdsSettings,
    KafkaSettings,
    QueuePolicy,
    apply_environment,
    load_cluster,
)
from idl.topics import TopicNames
from outrider.client.view import LedgerView
from outrider.local import machine, readiness
from outrider.local.process import (
    KILL_WAIT_S,
    STOP_GRACE_S,
    find_marked,
    identity_of,
    log_tail,
    python_module,
    send_signal,
    spawn,
    stop_all,
    wait_gone,
)
from outrider.local.record import (
    DEFAULT_NAME,
    LOCK_MARK,
    Layout,
    ProcessRecord,
    Role,
    RunRecord,
    layout,
    write_atomically,
)

Progress = Callable[[str], None]
COORDINATORS_MAX: Final = 9
AGENTS_MAX: Final = 64
"""More on one machine measures the machine, not Outrider; `chaos` simulates larger clusters."""
SECRET_BYTES: Final = 32
REAL: Final = "real"
"""Among `node_profiles`: this machine itself."""
EMBEDDED_NOTE: Final = (
    "the embedded broker keeps everything in memory: a restart loses queues, ledger and results; "
    "for a durable one use --kafka apache or --kafka HOST:PORT"
)


def _quiet(_line: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a process is put: `wrapper` is argv that runs it (e.g. `nsenter --net=… `), `address`
    is where its /metrics and /ready are served, as seen from here."""

    address: str = machine.LOOPBACK
    wrapper: tuple[str, ...] = ()


HERE: Final = Placement()


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """What `up` starts. `None` for a node's share: this machine divided evenly.

    `node_profiles`: machines that the agents play in turn, simulated (`real`: this machine).
    `allow_host_network`: jobs of the profile `network` may run here. `images`: `NAME=dir:/PATH` or
    `NAME=oci:/PATH[:REF]`, roots that jobs may ask for.
    `tune` changes the cluster file before it is written (tests: shorter timeouts); `env` is added
    to every coordinator's and agent's environment; `placed` puts a process, by its name, somewhere
    else (the chaos harness: a network namespace each).
    """

    name: str = DEFAULT_NAME
    folder: str | Path | None = None
    kafka: str = "embedded"
    kafka_nodes: int = 1
    prefix: str = ""
    coordinators: int = 3
    agents: int = 2
    queues: tuple[str, ...] = ("default",)
    node_cpu_millis: int | None = None
    node_memory_bytes: int | None = None
    node_profiles: tuple[str, ...] = ()
    overcommit: bool = False
    allow_host_network: bool = False
    sandbox: str = "native"
    images: tuple[str, ...] = ()
    ready_timeout_s: float = 60.0
    env: Mapping[str, str] = field(default_factory=dict)
    tune: Callable[[ClusterSettings], ClusterSettings] = lambda settings: settings
    placed: Callable[[str], Placement] = lambda _name: HERE

    def check(self) -> None:
        """Raises ConfigError with the first thing wrong."""
        for what, count, most in (
            ("coordinators", self.coordinators, COORDINATORS_MAX),
            ("agents", self.agents, AGENTS_MAX),
        ):
            if not 1 <= count <= most:
                raise ConfigError(f"{count} {what}; a local cluster has 1 to {most}")
        for queue in self.queues:
            if not is_valid_name(queue):
                raise ConfigError(f"queue {queue!r} is not a name; use letters, digits, . _ -")


@contextmanager
def _locked(place: Layout) -> Iterator[None]:
    """One `up` or `down` at a time. Raises ConfigError where another one works."""
    try:
        place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(place.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use {place.folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(descriptor, LOCK_MARK, 0)
        yield
    except BlockingIOError:
        raise ConfigError(
            f"another `outrider up` or `down` works on {place.folder}; wait for it"
        ) from None
    finally:
        os.close(descriptor)


class LocalCluster:
    """A cluster on this machine. As a context manager it stops at the end of the block."""

    def __init__(self, place: Layout, run: RunRecord) -> None:
        self._place = place
        self._run = run
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    # -- ways to one ---------------------------------------------------------------------------

    @classmethod
    def start(
        cls, options: LocalOptions | None = None, progress: Progress = _quiet
    ) -> "LocalCluster":
        """Starts a cluster and returns once a leader is elected and every node was seen.

        Raises ConfigError (also where it already runs), PlatformFaultError, BrokerUnavailableError.
        """
        options = options or LocalOptions()
        options.check()
        share = machine.share_of_host(
            options.agents,
            cpus=machine.host_cpus(),
            memory_bytes=machine.host_memory_bytes(),
            cpu_millis=options.node_cpu_millis,
            node_memory_bytes=options.node_memory_bytes,
            overcommit=options.overcommit,
        )
        place = layout(options.name, options.folder)
        place.check_free()
        with _locked(place):
            cls._clear_leftovers(place, progress)
            cluster = cls(place, _fresh_run(options))
            try:
                cluster._bring_up(options, share, progress)
            except BaseException:
                progress("stopping what was started")
                cluster._shut_down(progress)
                raise
        return cluster

    @classmethod
    def attach(
        cls, name: str = DEFAULT_NAME, folder: str | Path | None = None
    ) -> "LocalCluster | None":
        """The cluster recorded under this name, running or left over; None where there is none."""
        place = layout(name, folder)
        run = place.read_run()
        return None if run is None else cls(place, run)

    @classmethod
    def _clear_leftovers(cls, place: Layout, progress: Progress) -> None:
        run = place.read_run()
        if run is None:
            return
        alive = [record.name for record in run.processes if record.alive]
        if run.phase == "up" and alive:
            dead = [record.name for record in run.processes if not record.alive]
            state = f", but {', '.join(dead)} ended" if dead else ""
            raise ConfigError(
                f"local cluster {run.name!r} is already up{state}; "
                "`outrider status` shows it, `outrider down` stops it"
            )
        progress("cleaning up after an earlier run")
        cls(place, run)._shut_down(progress)

    # -- what it is ----------------------------------------------------------------------------

    @property
    def place(self) -> Layout:
        """Its files."""
        return self._place

    @property
    def config_path(self) -> Path:
        """The cluster file: what `--config` and `Client(config=…)` take."""
        return self._place.cluster_file

    @property
    def run(self) -> RunRecord:
        """What was started, as recorded."""
        return self._run

    @property
    def processes(self) -> tuple[ProcessRecord, ...]:
        """Broker, coordinators and agents."""
        return self._run.processes

    @property
    def settings(self) -> ClusterSettings:
        """The cluster file, read, with `OUTRIDER_*` of this process over it."""
        return load_cluster(self.config_path, os.environ)

    # -- faults, for the demo and tests --------------------------------------------------------

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals one process; after a deadly signal returns once it is gone."""
        record = self._run.process(name)
        if record.identity is None or not send_signal(record.identity, number):
            raise ConfigError(f"process {name!r} is not running")
        if number == signal.SIGKILL:
            wait_gone(record.identity, KILL_WAIT_S)
        self._reap(name)

    def restart(self, name: str) -> ProcessRecord:
        """Starts a coordinator or agent again with its arguments; stops it first if it runs.

        Returns at once: /ready and the ledger tell when it is back.
        """
        record = self._run.process(name)
        if record.role == "broker":
            raise ConfigError("the broker is not restarted here; use `outrider down` and `up`")
        if record.identity is not None:
            stop_all([record.identity])
        self._reap(name)
        return self._spawn(record)

    def stop(self, progress: Progress = _quiet, *, purge: bool = False) -> list[str]:
        """Stops agents, coordinators, broker. Returns notes on what had to be killed. Idempotent.

        `purge` removes the cluster's folder with all data in it. Raises ConfigError where that
        fails.
        """
        if not self._place.folder.exists():
            return []
        with _locked(self._place):
            notes = self._shut_down(progress)
            if purge:
                progress(f"removing {self._place.folder}")
                self._place.remove()
        return notes

    @staticmethod
    def purge(place: Layout) -> None:
        """Removes the folder of a cluster that does not run. Raises ConfigError: it is none's."""
        place.check_ours()
        with _locked(place):
            place.remove()

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- up ------------------------------------------------------------------------------------

    def _bring_up(self, options: LocalOptions, share: machine.Share, progress: Progress) -> None:
        self._put_logs_aside()
        self._record(self._run)
        broker = self._start_broker(options, progress)
        settings = self._write_settings(options, broker)
        progress("creating topics")
        names = TopicNames(settings.kafka.prefix)
        table = names.table(settings.pool, tuple(settings.queues), settings.kafka.queue_partitions)
        for note in ensure_topics(settings.kafka, table, progress=progress).notes:
            progress(note)
        view = LedgerView(settings)
        view.advance()
        ports = machine.free_tcp_ports(options.coordinators + options.agents)
        for peer in settings.coordinators:
            self._start_coordinator(peer, ports.pop(), options)
        for index in range(options.agents):
            self._start_agent(index, share, ports.pop(), options)
        self._wait(view, options, progress)
        self._record(msgspec.structs.replace(self._run, phase="up"))

    def _put_logs_aside(self) -> None:
        """Each run starts with empty logs; those of the run before are kept beside them."""
        logs = self._place.logs
        previous = logs.with_name(f"{logs.name}.previous")
        if logs.exists():
            shutil.rmtree(previous, ignore_errors=True)
            logs.rename(previous)
        logs.mkdir()

    def _start_broker(self, options: LocalOptions, progress: Progress) -> Broker:
        client = apply_environment(KafkaSettings(), os.environ).client
        broker = open_broker(
            options.kafka, self._place.broker, nodes=options.kafka_nodes, client=client
        )
        if not broker.durable:
            progress(EMBEDDED_NOTE)
            shutil.rmtree(self._place.state, ignore_errors=True)
        self._place.state.mkdir(exist_ok=True)
        broker.start(progress)
        self._record(
            msgspec.structs.replace(self._run, kafka=broker.bootstrap, durable=broker.durable)
        )
        for index, pid in enumerate(broker.pids):
            self._record(
                self._run.having(
                    ProcessRecord(
                        name=f"broker-{index}" if len(broker.pids) > 1 else "broker",
                        role="broker",
                        arguments=(),
                        log=str(broker.directory),
                        note=f"{broker.kind} at {broker.bootstrap}",
                        identity=identity_of(pid),
                    )
                )
            )
        return broker

    def _coordinator_key(self, name: str) -> str:
        """Makes an Ed25519 key beside the secret, where the coordinator looks; its public half."""
        private, public = new_private_key()
        path = self._place.secret_file.with_name(f"{name}.key")
        write_atomically(path, private.encode() + b"\n", mode=0o600)
        return public

    def _write_settings(self, options: LocalOptions, broker: Broker) -> ClusterSettings:
        if not self._place.secret_file.exists():
            secret = secrets.token_hex(SECRET_BYTES).encode() + b"\n"
            write_atomically(self._place.secret_file, secret, mode=0o600)
        participants = options.coordinators + options.agents
        domain = machine.free_dds_domain(participants, start=os.getpid())
        hints = machine.free_tcp_ports(options.coordinators)
        settings = options.tune(
            ClusterSettings(
                cluster=options.name,
                kafka=KafkaSettings(
                    bootstrap=broker.bootstrap,
                    kind=broker.kind,
                    prefix=options.prefix,
                    replication_factor=3 if len(broker.pids) >= 3 else 1,
                ),
                dds=DdsSettings(domain=domain, tag=f"outrider-{options.name}"),
                coordinators=tuple(
                    CoordinatorPeer(
                        name=CoordinatorId(f"c{index + 1}"),
                        address=machine.LOOPBACK,
                        dds_port=machine.coordinator_dds_port(domain, index),
                        hint_port=hint,
                        public_keys=(self._coordinator_key(f"c{index + 1}"),),
                    )
                    for index, hint in enumerate(hints)
                ),
                queues={QueueName(queue): QueuePolicy() for queue in options.queues},
                secret_file=str(self._place.secret_file),
                state_dir=str(self._place.state),
            )
        )
        content = msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"
        write_atomically(self._place.cluster_file, content)
        return load_cluster(self._place.cluster_file, os.environ)

    def _start_coordinator(self, peer: CoordinatorPeer, port: int, options: LocalOptions) -> None:
        arguments = python_module("controlplane.coordinator", *self._common(peer.name, port))
        self._spawn(self._planned(peer.name, "coordinator", arguments, port, options))

    def _start_agent(
        self, index: int, share: machine.Share, port: int, options: LocalOptions
    ) -> None:
        name = f"n{index + 1}"
        profiles = options.node_profiles or (REAL,)
        profile = profiles[index % len(profiles)]
        if profile == REAL:
            part = f"{index + 1}/{options.agents}"
            room = ("--cpu", f"{share.cpu_millis}m", "--memory", str(share.memory_bytes))
            offers: tuple[str, ...] = (*room, "--gpus", part, "--cpus", part)
            note = f"offers {share}"
        else:
            offers = ("--node-profile", profile)
            note = f"simulated: plays {profile}, jobs get no GPU"
        if options.allow_host_network:
            offers = (*offers, "--allow-host-network")
        images = (word for image in options.images for word in ("--image", image))
        offers = (*offers, "--sandbox", options.sandbox, *images)
        arguments = python_module("node_agent.agent", *self._common(name, port), *offers)
        self._spawn(self._planned(name, "agent", arguments, port, options, note))

    def _common(self, name: str, port: int) -> tuple[str, ...]:
        return (
            "--config", str(self._place.cluster_file), "--name", name,
            "--metrics-port", str(port),
        )  # fmt: skip

    def _planned(
        self,
        name: str,
        role: Role,
        arguments: list[str],
        port: int,
        options: LocalOptions,
        note: str = "",
    ) -> ProcessRecord:
        placement = options.placed(name)
        return ProcessRecord(
            name=name,
            role=role,
            arguments=(*placement.wrapper, *arguments, "--metrics-address", placement.address),
            log=str(self._place.logs / f"{name}.log"),
            metrics_address=placement.address,
            metrics_port=port,
            note=note,
            env=dict(options.env),
        )

    def _spawn(self, planned: ProcessRecord) -> ProcessRecord:
        planned = msgspec.structs.replace(planned, identity=None)
        self._record(self._run.having(planned))
        mark = self._place.mark + planned.name
        child = spawn(planned.arguments, Path(planned.log), mark, planned.env)
        self._children[planned.name] = child
        started = msgspec.structs.replace(planned, identity=identity_of(child.pid))
        self._record(self._run.having(started))
        return started

    def _record(self, run: RunRecord) -> None:
        self._run = run
        self._place.write_run(run)

    def _wait(self, view: LedgerView, options: LocalOptions, progress: Progress) -> None:
        deadline = time.monotonic() + options.ready_timeout_s
        ours = [record for record in self.processes if record.role != "broker"]
        try:
            readiness.wait_ready(ours, deadline, self._exit_code, progress)
            nodes = {record.name for record in ours if record.role == "agent"}
            readiness.wait_led(view, nodes, deadline, progress)
        except readiness.NotReadyError as error:
            record = self._run.process(error.process) if error.process else None
            tail = log_tail(Path(record.log)) if record else ""
            raise StartFailedError(str(error), tail) from error

    def _exit_code(self, name: str) -> int | None:
        child = self._children.get(name)
        return None if child is None else child.poll()

    # -- down ----------------------------------------------------------------------------------

    def _shut_down(self, progress: Progress) -> list[str]:
        notes: list[str] = []
        for role in ("agent", "coordinator"):
            known = {r.identity: r.name for r in self.processes if r.role == role and r.identity}
            running = [identity for identity in known if identity_of(identity.pid) == identity]
            if running:
                progress(f"stopping {len(running)} {role}{'s' if len(running) > 1 else ''}")
            for stubborn in stop_all(running):
                notes.append(f"{known[stubborn]} did not stop in {STOP_GRACE_S:g} s: killed")
        notes += self._stop_unrecorded()
        self._stop_broker(progress)
        for name in list(self._children):
            self._reap(name)
        self._place.run_file.unlink(missing_ok=True)
        self._run = msgspec.structs.replace(self._run, phase="starting", processes=())
        return notes

    def _stop_unrecorded(self) -> list[str]:
        """Started by a crashed `up` before it could note the pid, or left by a killed agent."""
        broker = {record.identity for record in self.processes if record.role == "broker"}
        left = [
            i for i in find_marked(self._place.mark) if i not in broker and i.pid != os.getpid()
        ]
        stop_all(left, grace_s=KILL_WAIT_S)
        return [f"process {identity.pid} was left over: stopped" for identity in left]

    def _stop_broker(self, progress: Progress) -> None:
        broker = attach_broker(self._place.broker) if self._place.broker.exists() else None
        if broker is not None and broker.pids:
            progress(f"stopping the {broker.kind} broker")
            broker.stop()

    def _reap(self, name: str) -> None:
        """Takes the exit code of a child of ours, so that no zombie stays behind."""
        child = self._children.get(name)
        if child is not None and child.poll() is not None:
            del self._children[name]


class StartFailedError(PlatformFaultError):
    """`up` failed. `log` is the tail of the guilty process's log (shown with -v)."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def _fresh_run(options: LocalOptions) -> RunRecord:
    return RunRecord(
        name=options.name,
        phase="starting",
        started_ms=time.time_ns() // 1_000_000,
        kafka=options.kafka,
    )
