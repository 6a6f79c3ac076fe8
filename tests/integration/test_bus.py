"""Real Cyclone DDS on loopback: delivery, late joiners, forgeries, a stalled reader."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.topic import Topic
from msgspec.structs import replace

from idl.control import AttemptStatus, Ballot, Beacon, ControlBody, Intent, NodeReport
from idl.dds import link, topics
from idl.dds.bus import LocalDomain
from idl.dds.domain import discovery_port, domain_xml
from idl.dds.link import ControlLink
from idl.dds.peers import PeerAddresses
from idl.dds.types import Envelope
from idl.envelope import Message
from idl.errors import ConfigError, PlatformFaultError
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

    def __init__(
        self,
        settings: ClusterSettings,
        name: str,
        port: int,
        addresses: PeerAddresses | None = None,
    ) -> None:
        self.bodies: list[ControlBody] = []
        self.link = ControlLink(
            settings, name, Incarnation(time.time_ns()), own_port=port, reads=READS, writes=READS,
            receive=self.bodies.extend, now_ms=now_ms, addresses=addresses,
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
    for each in (leader, *agents.values()):
        each.start()
    intent = Intent(pool="main", node=target, node_incarnation=1, term=1, leader="c0", items=())

    def reached() -> bool:
        leader.send(topics.INTENT, intent, 1)
        return len(heard[target]) >= 5 and agents[near].received >= 5

    try:
        await until(reached)
        assert heard[near] == [], "an intent for another node is dropped"
        assert agents[far].received == 0, "another shard does not even receive it"
    finally:
        for each in (leader, *agents.values()):
            each.close()
        domain.close()


async def test_a_status_reaches_its_addressee_or_everybody(tmp_path: Path) -> None:
    settings = cluster(tmp_path)
    heard: dict[str, list[ControlBody]] = {"c0": [], "c1": []}
    readers = [
        ControlLink(
            settings, name, Incarnation(1), own_port=discovery_port(DOMAIN, index),
            reads=(topics.ATTEMPT_STATUS,), writes=(), receive=heard[name].extend, now_ms=now_ms,
        )
        for index, name in enumerate(heard)
    ]  # fmt: skip
    only_c0 = replace(settings, coordinators=settings.coordinators[:1])
    agent = ControlLink(
        settings, "n1", Incarnation(1), own_port=0, reads=(), writes=(topics.ATTEMPT_STATUS,),
        receive=lambda _bodies: None, now_ms=now_ms, only_key="n1",
    )  # fmt: skip
    agent.follow(only_c0.coordinators)
    agent.follow(settings.coordinators)
    for each in (*readers, agent):
        each.start()
    sent: dict[str, set[int]] = {}

    def got(name: str, to: str) -> bool:
        """Tells `to` once more; whether `name` has heard anything told to `to`."""
        number = sum(map(len, sent.values()))
        sent.setdefault(to, set()).add(number)
        status = AttemptStatus(pool="main", node="n1", incarnation=number, term=1, full=False)
        agent.send(topics.ATTEMPT_STATUS, status, 1, to=to)
        numbers = {body.incarnation for body in heard[name] if isinstance(body, AttemptStatus)}
        return bool(numbers & sent[to])

    try:
        for name, to in (("c0", ""), ("c1", ""), ("c0", "c0"), ("c1", "c1"), ("c0", "c9")):
            await until(partial(got, name, to))
        await until(lambda: got("c1", "c9"))
        assert not got("c1", "c0"), "what is for c0 alone is not heard by c1"
        assert not got("c0", "c1")
    finally:
        for each in (*readers, agent):
            each.close()


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


# --- peers that move, peers that are added --------------------------------------------------------


async def test_a_name_that_does_not_resolve_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent starts all the same, says so once, and is heard once the name means somebody."""
    monkeypatch.setattr(link, "RESOLVE_EVERY_S", 0.05)
    known: dict[str, str] = {}

    def lookup(name: str) -> str:
        if name not in known:
            raise ConfigError(f"coordinator address {name!r} does not resolve")
        return known[name]

    coordinator = Heard(cluster(tmp_path), "c0", discovery_port(DOMAIN, 0))
    settings = cluster(tmp_path)
    nowhere = tuple(replace(peer, address="c.example") for peer in settings.coordinators)
    agent = Heard(replace(settings, coordinators=nowhere), "n1", 0, PeerAddresses(lookup))
    agent.link.send(topics.NODE_REPORT, report("n1"))
    minding = asyncio.ensure_future(agent.link.mind_peers())
    try:
        await asyncio.sleep(0.3)
        assert coordinator.bodies == []
        told = [r for r in caplog.records if r.message == "peer not found yet"]
        assert {r.peer for r in told} == {"c0", "c1"} and len(told) == 2  # type: ignore[attr-defined]
        known["c.example"] = "127.0.0.1"
        await until(lambda: report("n1") in coordinator.bodies)
    finally:
        minding.cancel()
        agent.link.close()
        coordinator.link.close()


async def test_an_added_coordinator_is_called_and_believed(tmp_path: Path) -> None:
    """The agent is told of c1, joins anew, and says its lasting words again, of its own accord."""
    both = cluster(tmp_path)
    one = replace(both, coordinators=both.coordinators[:1])
    agent = Heard(one, "n1", 0)
    agent.link.send(topics.NODE_REPORT, report("n1"))
    added = Heard(both, "c1", discovery_port(DOMAIN, 1))
    minding = asyncio.ensure_future(agent.link.mind_peers())
    try:
        await asyncio.sleep(1.5)
        assert added.bodies == [], "nobody calls it"
        agent.link.follow(both.coordinators)
        await until(lambda: report("n1") in added.bodies)
    finally:
        minding.cancel()
        agent.link.close()
        added.link.close()


def test_a_name_that_fails_keeps_the_address_it_had() -> None:
    known = {"a": "10.0.0.1"}

    def lookup(name: str) -> str:
        try:
            return known[name]
        except KeyError:
            raise ConfigError(name) from None

    peers = (CoordinatorPeer(name=CoordinatorId("c1"), address="a", dds_port=7410),)
    addresses = PeerAddresses(lookup)
    assert addresses.look_up(peers) == {"10.0.0.1:7410"}
    del known["a"]
    assert addresses.look_up(peers) == {"10.0.0.1:7410"}
    known["a"] = "10.0.0.2"
    assert addresses.look_up(peers) == {"10.0.0.2:7410"}
    assert addresses.look_up(()) == frozenset()


def stranger(
    settings: ClusterSettings, qos: Qos
) -> tuple[LocalDomain, DomainParticipant, DataWriter[Envelope]]:
    """Somebody who reaches the ports and writes what he likes; all three live as long as he."""
    domain = LocalDomain(
        domain_xml(settings.dds, PeerAddresses().look_up(settings.coordinators), 0)
    )
    participant = DomainParticipant(domain.id)
    topic = Topic(participant, topics.BALLOT.name, Envelope)
    return domain, participant, DataWriter(participant, topic, qos)


async def test_a_writer_that_does_not_match_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = cluster(tmp_path)
    heard = Heard(settings, "c0", discovery_port(DOMAIN, 0))
    other, _, writer = stranger(settings, Qos(Policy.Reliability.BestEffort))
    try:
        await until(lambda: heard.link.counts()["incompatible-qos"] > 0)
        assert any("does not match ours" in r.getMessage() for r in caplog.records)
        assert writer is not None
    finally:
        heard.link.close()
        other.close()


async def test_a_stranger_whose_key_is_no_text_deafens_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes, and it leaves: the sample of its leaving has nothing but the key."""
    settings = cluster(tmp_path)
    heard = Heard(settings, "c1", discovery_port(DOMAIN, 1))
    other, participant, writer = stranger(settings, topics.BALLOT.qos())
    real = Envelope.serialize

    def hostile(self: Envelope, *given: object, **more: object) -> bytes:
        return real(self, *given, **more).replace(b"KEYKEY", b"\xff\xfeKEY\xff")  # type: ignore[arg-type]

    def told() -> bool:
        writer.write(Envelope("KEYKEY", "s", 1, "p", 0, 1, 1, "t", "{}"))
        return heard.link.counts().get("unsigned", 0) + heard.link.received >= 3

    friend = Heard(settings, "c0", discovery_port(DOMAIN, 0))
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Envelope, "serialize", hostile)
            await until(told)
        participant._delete(participant._ref)  # every instance of its is gone now
        await asyncio.sleep(0.5)
        sent = 0

        def answered() -> bool:
            nonlocal sent
            sent += 1
            friend.link.send(topics.BALLOT, ballot(sent))
            return bool(heard.bodies)

        await until(answered)
        assert heard.link._bus.failure is None
    finally:
        friend.link.close()
        heard.link.close()
        other.close()


async def test_a_process_that_hears_nothing_any_more_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(cluster(tmp_path), "c0", discovery_port(DOMAIN, 0))
    minding = asyncio.ensure_future(heard.link.mind_peers())
    try:
        monkeypatch.setattr(heard.link._bus, "_watch_qos", lambda: 1 / 0)
        async with asyncio.timeout(20):
            with pytest.raises(PlatformFaultError, match="not read"):
                await minding
    finally:
        minding.cancel()
        heard.link.close()


async def test_one_message_that_shows_a_bug_costs_none_of_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(cluster(tmp_path), "c0", discovery_port(DOMAIN, 0))
    real = heard.link._open
    bad, good = (Message("outrider_ballot", key, "s", 1, "p", 0, 1, 1, "{}") for key in "ab")

    def opening(message: Message) -> ControlBody | None:
        assert real(message) is None
        if message is bad:
            raise RuntimeError("a bug")
        return ballot(1)

    monkeypatch.setattr(heard.link, "_open", opening)
    try:
        heard.link._deliver([bad, good])
        assert heard.bodies == [ballot(1)] and heard.link.counts()["unreadable"] == 1
    finally:
        heard.link.close()
