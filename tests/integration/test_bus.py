"""Real Cyclone DDS on loopback: delivery, late joiners, forgeries, a stalled reader."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from idl.control import Ballot, Beacon, ControlBody, Intent, NodeReport
from idl.dds import topics
from idl.dds.bus import LocalDomain
from idl.dds.domain import discovery_port, domain_xml
from idl.dds.link import ControlLink
from idl.dds.peers import PeerAddresses
from idl.errors import ConfigError
from idl.ids import CoordinatorId, Incarnation
from idl.ledger import Capacity
from idl.members import CoordinatorPeer
from idl.settings import ClusterSettings, DdsSettings

DOMAIN = 91
READS = (topics.BALLOT, topics.BEACON, topics.NODE_REPORT)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def cluster(folder: Path, secret: str = "ab" * 32, domain: int = DOMAIN) -> ClusterSettings:
    file = folder / f"secret-{secret[:4]}"
    file.write_text(secret)
    file.chmod(0o600)
    return ClusterSettings(
        dds=DdsSettings(domain=domain, tag=folder.name, interface="127.0.0.1"),
        coordinators=tuple(
            CoordinatorPeer(name=CoordinatorId(f"c{i}"), dds_port=discovery_port(domain, i))
            for i in range(2)
        ),
        secret_file=str(file),
    )


class Heard:
    """A link and what it received."""

    def __init__(self, settings: ClusterSettings, name: str, port: int) -> None:
        self.bodies: list[ControlBody] = []
        self.link = ControlLink(
            settings, name, Incarnation(time.time_ns()), own_port=port, reads=READS, writes=READS,
            receive=self.bodies.extend, now_ms=now_ms,
        )  # fmt: skip
        self.link.start()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Heard]]:
    started: list[Heard] = []

    def begin(name: str, index: int | None, secret: str = "ab" * 32) -> Heard:
        port = 0 if index is None else discovery_port(DOMAIN, index)
        started.append(Heard(cluster(tmp_path, secret), name, port))
        return started[-1]

    yield begin
    for heard in started:
        heard.link.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - DDS gives no event to wait for
            await asyncio.sleep(0.02)


def ballot(number: int) -> Ballot:
    return Ballot(kind="vote", role="r", term=number, candidate="c0", incarnation=1, round=number)


def report(node: str) -> NodeReport:
    capacity = Capacity(cpu_millis=1000, memory_bytes=1)
    return NodeReport(pool="main", node=node, incarnation=1, capacity=capacity, enforces=())


async def test_coordinators_hear_each_other_in_order(start: Callable[..., Heard]) -> None:
    one, two = start("c0", 0), start("c1", 1)
    sent = 0

    def told() -> bool:
        nonlocal sent
        sent += 1
        one.link.send(topics.BALLOT, ballot(sent))
        return len(two.bodies) >= 20

    await until(told)
    rounds = [body.round for body in two.bodies if isinstance(body, Ballot)]
    assert rounds == sorted(set(rounds))
    assert one.bodies == [], "a process does not hear itself"


async def test_an_agent_is_found_and_a_late_coordinator_gets_its_report(
    start: Callable[..., Heard],
) -> None:
    agent = start("n1", None)
    agent.link.send(topics.NODE_REPORT, report("n1"))
    late = start("c0", 0)
    await until(lambda: report("n1") in late.bodies)


async def test_an_intent_reaches_the_agents_of_its_shard_only(tmp_path: Path) -> None:
    settings = cluster(tmp_path)
    shards = settings.dds.intent_shards
    shard = {name: topics.INTENT.shard(name, shards) for name in (f"n{i}" for i in range(40))}
    target = "n0"
    near = next(name for name in shard if name != target and shard[name] == shard[target])
    far = next(name for name in shard if shard[name] != shard[target])
    heard: dict[str, list[ControlBody]] = {name: [] for name in (target, near, far)}
    port = discovery_port(DOMAIN, 0)
    leader = ControlLink(
        settings, "c0", Incarnation(1), own_port=port, reads=(), writes=(topics.INTENT,),
        receive=lambda _bodies: None, now_ms=now_ms,
    )  # fmt: skip
    domain = LocalDomain(
        domain_xml(settings.dds, PeerAddresses().look_up(settings.coordinators), 0)
    )
    agents = {
        name: ControlLink(
            settings, name, Incarnation(1), own_port=0, reads=(topics.INTENT,), writes=(),
            receive=heard[name].extend, now_ms=now_ms, only_key=name, domain=domain,
        )
        for name in heard
    }  # fmt: skip
    for link in (leader, *agents.values()):
        link.start()
    intent = Intent(pool="main", node=target, node_incarnation=1, term=1, leader="c0", items=())

    def reached() -> bool:
        leader.send(topics.INTENT, intent, 1)
        return len(heard[target]) >= 5 and agents[near].received >= 5

    try:
        await until(reached)
        assert heard[near] == [], "an intent for another node is dropped"
        assert agents[far].received == 0, "another shard does not even receive it"
    finally:
        for link in (leader, *agents.values()):
            link.close()
        domain.close()


async def test_strangers_and_forgers_are_counted_and_ignored(start: Callable[..., Heard]) -> None:
    honest, stranger = start("c0", 0), start("c1", 1, secret="cd" * 32)

    def refused() -> bool:
        beacon = Beacon(role="r", term=9, leader="c1", incarnation=1, lease_ms=1, ledger_offset=0)
        stranger.link.send(topics.BEACON, beacon)
        return honest.link.counts().get("bad-signature", 0) >= 3

    await until(refused)
    assert honest.bodies == []


async def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    settings = cluster(tmp_path)
    Path(settings.secret_file).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Heard(settings, "c0", discovery_port(DOMAIN, 0))
