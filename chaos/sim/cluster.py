"""The simulated cluster: coordinators, nodes, Kafka, network and clocks, wired together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from chaos.sim.agent import Node
from chaos.sim.checker import Checker
from chaos.sim.clock import Wall
from chaos.sim.kafka import Kafka
from chaos.sim.network import Network
from chaos.sim.process import SimCoordinator
from chaos.sim.world import World
from controlplane.core import events as e
from controlplane.core.silence import ElectionTiming
from idl.ids import CoordinatorId, PoolName
from idl.jobs import JobSpec
from idl.members import CoordinatorPeer, Members
from idl.records import Command, CommandRecord
from idl.settings import NodeTiming, QueuePolicy

if TYPE_CHECKING:
    from chaos.sim.plants import Plant

QUEUE: Final = "default"
LIVE_JOBS_MAX: Final = 12
"""Few, so that the backlog waits in Kafka and intake is paused and resumed."""
SPARE: Final = 2
"""Coordinators that may be added."""
SKEW_MS: Final = (0, 0, 5, -40, 700, -2_500)
DRIFT_PPM: Final = (0, 0, 100, -100, 5_000, -5_000)


def peer(number: int) -> CoordinatorPeer:
    """Coordinator `c<number>`."""
    return CoordinatorPeer(name=CoordinatorId(f"c{number}"), dds_port=7_408 + 2 * number)


class Cluster:
    """Everything of one life. Faults act upon it, `checker` judges it."""

    pool = PoolName("main")
    timing = NodeTiming(
        report_ms=500, heartbeat_ms=250, lost_ms=2_000, resend_ms=200, exclusive_lease_ms=3_000
    )
    election_timing = ElectionTiming(heartbeat_ms=100, timeout_ms=500)
    partitions = 2

    def __init__(
        self, world: World, *, coordinators: int = 3, nodes: int = 3, plant: Plant | None = None
    ) -> None:
        self.world, self.seed, self.plant = world, world.seed, plant
        self.checker = Checker(world)
        self.kafka = Kafka(world, self.checker.landed, self._news)
        self.network = Network(world)
        self.policies = {QUEUE: QueuePolicy(live_jobs_max=LIVE_JOBS_MAX)}
        self.file = tuple(peer(n) for n in range(1, coordinators + 1))
        """The coordinators of the cluster file; the ledger may change them."""
        spare = [f"c{coordinators + n}" for n in range(1, SPARE + 1)]
        self.node_names = [f"n{n}" for n in range(1, nodes + 1)]
        clocks = world.dice("clocks")
        names = [*(member.name for member in self.file), *self.node_names, *spare]
        self.walls = {name: Wall(world, clocks.choice(SKEW_MS)) for name in names}
        self.drift_ppm = {name: clocks.choice(DRIFT_PPM) for name in names}
        self._work = world.dice("work")
        self._incarnations = 0
        self.processes: dict[str, SimCoordinator] = {}
        self.cut_off: set[str] = set()
        """Coordinators that do not reach Kafka."""
        self.nodes: dict[str, Node] = {}
        for member in self.file:
            self.start_coordinator(member.name)
        for name in self.node_names:
            self.nodes[name] = Node(self, name)

    def file_of(self, name: str) -> Members:
        """The cluster file of a coordinator: one that is to be added lists itself."""
        listed = any(member.name == name for member in self.file)
        return self.file if listed else (*self.file, peer(int(name[1:])))

    def next_incarnation(self) -> int:
        """Grows from start to start, whatever clocks say."""
        self._incarnations += 1
        return self._incarnations

    def _news(self) -> None:
        for process in self.processes.values():
            process.nudge()

    @property
    def leader(self) -> SimCoordinator | None:
        """Who leads, by its own books; the newest where several believe it."""
        leading = [process for process in self.processes.values() if process.leads]
        return max(leading, key=lambda process: process.core.term, default=None)

    # --- processes ----------------------------------------------------------------------------

    def start_coordinator(self, name: str) -> None:
        """A new process of this name, without memory."""
        if name in self.processes:
            self.processes[name].die()
        self.processes[name] = SimCoordinator(self, name, self.next_incarnation())

    def tell_gone(self, name: str) -> None:
        """The hint connections to `name` closed: a proof of nothing."""
        for peer in self.processes.values():
            if peer.alive and peer.name != name:
                gone = partial(peer.elect, e.PeerGone(peer=name))
                self.world.after(2, partial(peer.guard, gone))

    # --- work ---------------------------------------------------------------------------------

    def submit(self, name: str, spec: JobSpec | None) -> None:
        """Produces a submission, whenever Kafka is there; without a spec, a poisoned record."""
        if not self.kafka.available:
            self.world.after(50, partial(self.submit, name, spec))
            return
        source = self.kafka.next_source(f"queue.{QUEUE}", self._work.randrange(self.partitions))
        record = e.Submission(source=source, queue=QUEUE, key=name, spec=spec)
        if spec is None:
            record = msgspec.structs.replace(
                record, key="", error_code="not-msgpack", error_message="not a record"
            )
        self.kafka.produce(source, record)

    def command(self, command: Command) -> None:
        """An operator's word."""
        source = self.kafka.next_source("commands", 0)
        record = CommandRecord(by="tester", command=command)
        self.kafka.produce(source, e.CommandRead(source=source, record=record))

    @property
    def submitted(self) -> int:
        """Records in all queues."""
        return sum(
            len(records)
            for (topic, _), records in self.kafka.records.items()
            if topic.startswith("queue.")
        )
