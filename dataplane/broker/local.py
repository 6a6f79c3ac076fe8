"""What the embedded broker and a local Apache Kafka share: processes, ports, health, record."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from dataplane.broker import processes
from dataplane.broker.contract import BrokerKind, Progress, quiet
from dataplane.broker.processes import BrokerRecord, ProcessIdentity
from dataplane.kafka import check_reachable
from idl.errors import BrokerUnavailableError, PlatformFaultError
from idl.settings import KafkaSettings

HEALTH_TIMEOUT_S: Final = 2.0
START_POLL_S: Final = 0.02
HOST: Final = "127.0.0.1"
"""Local brokers are for this machine only."""


class LocalBroker(ABC):
    """Processes started here. See `Broker` for the contract."""

    kind: BrokerKind
    durable: bool
    start_timeout_s: float
    ports_per_node: int = 1

    def __init__(self, directory: Path, nodes: int = 1) -> None:
        self.directory = directory
        self.nodes = nodes
        self._ports: tuple[int, ...] = ()
        self._processes: tuple[ProcessIdentity, ...] = ()
        self._reload()

    @property
    def bootstrap(self) -> str:
        """`127.0.0.1:PORT,…`; empty before the first start."""
        return ",".join(f"{HOST}:{port}" for port in self._ports[: self.nodes])

    @property
    def pids(self) -> tuple[int, ...]:
        """Live processes, in node order."""
        processes.reap()
        self._reload()
        return tuple(p.pid for p in self._processes if processes.is_alive(p))

    def _reload(self) -> None:
        """The record is the truth: another object or process may have (re)started nodes."""
        record = processes.read_record(self.directory)
        if record is not None and record.kind == self.kind:
            self._ports = record.ports
            self._processes = record.processes
            self.nodes = len(record.ports) // self.ports_per_node or self.nodes

    def log_path(self, index: int) -> Path:
        """Everything node `index` (from 0) prints."""
        return self.directory / f"node-{index}.log"

    def start(self, progress: Progress = quiet) -> None:
        """Starts every node that does not run; returns once all of them answer."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if len(self.pids) < self.nodes:
            if not self.pids:
                self._choose_ports()
                self._processes = ()
                self._record()
            self._prepare(progress)
            for index in range(self.nodes):
                self.start_node(index)
        try:
            self._wait_ready(progress)
        except PlatformFaultError:
            self.stop()
            raise

    def start_node(self, index: int) -> None:
        """Starts one node (again), without waiting for it; nothing if it runs."""
        self._reload()
        if index < len(self._processes) and processes.is_alive(self._processes[index]):
            return
        started = processes.spawn(self._argv(index), self.log_path(index), self._env(index))
        before = self._processes[:index]
        self._processes = (*before, started, *self._processes[index + 1 :])
        self._record()

    def healthy(self) -> bool:
        """Whether all nodes live and are in the metadata, asked for at most 2 s."""
        if len(self.pids) < self.nodes:
            return False
        try:
            return self._count(HEALTH_TIMEOUT_S) == self.nodes
        except PlatformFaultError:
            return False

    def stop(self) -> None:
        """SIGTERM, wait, SIGKILL. Idempotent. Ports are remembered for the next start."""
        self._reload()
        if self._processes:
            processes.stop(self._processes)
            self._processes = ()
            if self.directory.is_dir():
                self._record()

    def _record(self) -> None:
        processes.write_record(
            self.directory,
            BrokerRecord(
                kind=self.kind,
                bootstrap=self.bootstrap,
                ports=self._ports,
                processes=self._processes,
            ),
        )

    def _choose_ports(self) -> None:
        count = self.nodes * self.ports_per_node
        wanted = self._ports if len(self._ports) == count else (0,) * count
        chosen: list[int] = []
        for port in wanted:
            found = processes.free_port(port)
            while found in chosen:
                found = processes.free_port()
            chosen.append(found)
        self._ports = tuple(chosen)

    def _count(self, timeout_s: float) -> int:
        return check_reachable(KafkaSettings(bootstrap=self.bootstrap), timeout_s)

    def _wait_ready(self, progress: Progress) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            if len(self.pids) < self.nodes:
                raise self._failed("ended while starting")
            try:
                if self._count(0.5) == self.nodes:
                    progress(f"{self.kind} broker answers at {self.bootstrap}")
                    return
            except BrokerUnavailableError:
                pass  # expected until it listens; the deadline below bounds it
            time.sleep(START_POLL_S)
        raise self._failed(f"did not answer within {self.start_timeout_s:.0f} s")

    def _failed(self, what: str) -> PlatformFaultError:
        index = next((i for i, p in enumerate(self._processes) if not processes.is_alive(p)), 0)
        log = self.log_path(index)
        return PlatformFaultError(
            f"{self.kind} broker {what}: {processes.log_tail(log)}; the whole log is {log}"
        )

    @abstractmethod
    def _prepare(self, progress: Progress) -> None:
        """Whatever must be there before a node starts (binaries, formatted storage)."""

    @abstractmethod
    def _argv(self, index: int) -> list[str]:
        """The command line of node `index`."""

    def _env(self, index: int) -> dict[str, str]:
        """Variables of node `index` beyond the few that are kept."""
        return {}
