"""One coordinator process: its DDS link and hints, shared by the pools that it serves.

Each pool has a cluster file, a ledger, an election and a driver of its own
(`controlplane.coordinator`); what they share is who this process is and how it is reached. So the
leads of several pools may lie on one process or be spread: each file has its own preferences.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

from controlplane.hints import Hints
from dataplane.crew import Crew
from dataplane.process import now_ms
from idl.control import (
    AttemptStatus,
    Ballot,
    BallotReply,
    Beacon,
    ControlBody,
    NodeReport,
)
from idl.dds import topics
from idl.dds.link import ControlLink
from idl.errors import ConfigError
from idl.ids import Incarnation, PoolName, scheduler_role
from idl.members import CoordinatorPeer, Members
from idl.settings import ClusterSettings

HAND_OVER_S: Final = 0.3
"""After SIGTERM a leader announces that it steps down and gives the announcement time to leave."""
POOLS_MAX: Final = 16
"""Each has three Kafka clients and an election; more pools than this want more processes."""

log = logging.getLogger("coordinator")


class PoolDriver(Protocol):
    """What the process asks of the driver of one pool."""

    @property
    def settings(self) -> ClusterSettings:
        """Its cluster file."""

    async def open(self, crew: Crew, stopping: asyncio.Event) -> None:
        """Reads its ledger. Raises OutriderError."""

    def begin(self) -> None:
        """The link hears now: takes part."""

    def hear(self, bodies: list[ControlBody]) -> None:
        """Takes what concerns it."""

    def peer_gone(self, peer: str) -> None:
        """A hint."""

    def step_down(self) -> bool:
        """Gives the role up, for a shutdown; True where it had it."""

    async def close(self) -> None:
        """Lets go of Kafka. Idempotent, also after a failed `open`."""


class CoordinatorProcess:
    """Construct, `add` the pools, then `run`."""

    def __init__(
        self,
        files: Sequence[ClusterSettings],
        name: str,
        incarnation: Incarnation,
        key_file: str = "",
    ) -> None:
        """`files`: of the pools. Raises ConfigError, PlatformFaultError."""
        check_pools(files, name)
        own = files[0].coordinator(name)
        self._members = {file.pool: file.coordinators for file in files}
        self._pools: dict[str, PoolDriver] = {}
        self._hints = Hints(own, self._everybody(), self._peer_gone)
        self.link = ControlLink(
            files[0],
            name,
            incarnation,
            own_port=own.dds_port,
            reads=(
                topics.BALLOT,
                topics.BALLOT_REPLY,
                topics.BEACON,
                topics.ATTEMPT_STATUS,
                topics.NODE_REPORT,
            ),
            writes=(
                topics.BALLOT,
                topics.BALLOT_REPLY,
                topics.BEACON,
                topics.INTENT,
                topics.QUEUE_STATE,
            ),
            receive=self._hear,
            now_ms=now_ms,
            key_file=key_file,
        )
        self.link.follow(self._everybody())

    def add(self, driver: PoolDriver) -> None:
        """The driver of one of the files' pools."""
        pool = driver.settings.pool
        self._pools[pool] = self._pools[scheduler_role(pool)] = driver

    def refused(self, driver: PoolDriver) -> dict[str, int]:
        """Counts of the link, for one of the drivers to show: they are of no pool."""
        return self.link.counts() if driver is next(iter(self._pools.values())) else {}

    def follow(self, pool: PoolName, members: Members) -> None:
        """The ledger of `pool` changed its membership: hints, keys and DDS peers follow."""
        self._members = {**self._members, pool: members}
        self._hints.follow(self._everybody())
        self.link.follow(self._everybody())

    def _everybody(self) -> Members:
        """The members of all pools; all describe one of a name alike, else the last counts."""
        found: dict[str, CoordinatorPeer] = {}
        for members in self._members.values():
            found |= {peer.name: peer for peer in members}
        return tuple(found.values())

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping`. Raises OutriderError where the process cannot go on."""
        crew = Crew()
        drivers = list(dict.fromkeys(self._pools.values()))
        try:
            for driver in drivers:
                await driver.open(crew, stopping)
            self.link.start()
            crew.spawn(self.link.mind_peers())
            crew.spawn(self._hints.run())
            for driver in drivers:
                driver.begin()
            await crew.until(stopping)
            log.info("stopping")
            led = [driver.step_down() for driver in drivers]
            if any(led):
                await asyncio.sleep(HAND_OVER_S)
        finally:
            crew.cancel()
            self.link.close()
            for driver in drivers:
                await driver.close()

    def _hear(self, bodies: list[ControlBody]) -> None:
        """Each to the pool that it is about; what is about another pool is nobody's here."""
        sorted_out: dict[PoolDriver, list[ControlBody]] = {}
        for body in bodies:
            driver = self._pools.get(_about(body))
            if driver is not None:
                sorted_out.setdefault(driver, []).append(body)
        for driver, its in sorted_out.items():
            driver.hear(its)

    def _peer_gone(self, peer: str) -> None:
        for driver in dict.fromkeys(self._pools.values()):
            driver.peer_gone(peer)


def _about(body: ControlBody) -> str:
    """The role or the pool that a message is about."""
    match body:
        case Ballot() | BallotReply() | Beacon():
            return body.role
        case NodeReport() | AttemptStatus():
            return body.pool
        case _:
            log.warning("unexpected control body", extra={"kind": type(body).__name__})
            return ""


def check_pools(files: Sequence[ClusterSettings], name: str) -> None:
    """What several files of one process must share, and what they must not. Raises ConfigError."""
    first = files[0]
    if len(files) > POOLS_MAX:
        raise ConfigError(f"{len(files)} pools for one coordinator process, at most {POOLS_MAX}")
    for number, file in enumerate(files):
        shared = {
            "cluster": (file.cluster, first.cluster),
            "dds": (file.dds, first.dds),
            "secret_file": (file.secret_file, first.secret_file),
            "election": (file.election, first.election),
        }
        for what, (theirs, ours) in shared.items():
            if theirs != ours:
                raise ConfigError(
                    f"pools {first.pool} and {file.pool} differ in `{what}`; one coordinator "
                    "process serves both, so their cluster files must agree there"
                )
        here, there = file.coordinator(name), first.coordinator(name)
        if (here.address, here.dds_port, here.hint_port, here.public_keys) != (
            there.address, there.dds_port, there.hint_port, there.public_keys,
        ):  # fmt: skip
            raise ConfigError(
                f"pools {first.pool} and {file.pool} describe coordinator {name} differently"
            )
        for other in files[:number]:
            where = (file.kafka.bootstrap, file.kafka.prefix)
            if other.pool == file.pool:
                raise ConfigError(f"pool {file.pool} is given twice; each file has a pool")
            if where == (other.kafka.bootstrap, other.kafka.prefix):
                raise ConfigError(
                    f"pools {other.pool} and {file.pool} would share their topics; "
                    "give each a `kafka.prefix` of its own"
                )
