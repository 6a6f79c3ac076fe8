"""The control link of one process: typed bodies in and out, signed and checked on the way.

Joins bus, envelope and codec, so that neither coordinator nor agent sees an unsigned byte.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from idl.codec import decode_body, encode_body
from idl.control import (
    AttemptStatus,
    Ballot,
    BallotReply,
    Beacon,
    ControlBody,
    Intent,
    NodeReport,
    QueueState,
)
from idl.dds.bus import Bus, LocalDomain
from idl.dds.domain import domain_xml
from idl.dds.peers import RESOLVE_EVERY_S, PeerAddresses
from idl.dds.topics import ALL, DdsTopic
from idl.envelope import Message, Opener, Sealer
from idl.errors import ConfigError, InvalidRecordError, PlatformFaultError
from idl.ids import CoordinatorId, Incarnation, Term
from idl.keys import Keyring, coordinator_principal, private_key, public_keys, read_keyring
from idl.members import CoordinatorPeer, Members
from idl.settings import ClusterSettings

log = logging.getLogger(__name__)

REFUSALS_LOG_MS: Final = 10_000
"""One log line per reason in this time: a stranger must not be able to fill the disk with logs."""
KEYS_CHECK_MS: Final = 2_000
"""How often a changed secret file is looked for."""
DEPARTED_MS: Final = 10_000
"""How long a removed coordinator's keys still count: its goodbye must be understood."""

_TOPICS: Final = {topic.name: topic for topic in ALL}
_OF_NODES: Final = (AttemptStatus, NodeReport)
"""Said by a node of itself: its sender is its key."""


def instance_key(body: ControlBody) -> str:
    """The DDS key of a body: node, role or queue (DESIGN, contracts)."""
    match body:
        case Intent() | AttemptStatus() | NodeReport():
            return body.node
        case Ballot() | BallotReply() | Beacon():
            return body.role
        case QueueState():
            return body.queue


def claimed_sender(body: ControlBody) -> str | None:
    """Who a body says it is from, where it says so: nobody votes or leads for another."""
    match body:
        case Ballot():
            return body.candidate
        case BallotReply():
            return body.voter
        case Beacon() | Intent():
            return body.leader
        case AttemptStatus() | NodeReport():
            return body.node
        case QueueState():
            return None


def _read_private(path: str) -> str:
    """Raises ConfigError, also where others may read the file."""
    file = Path(path)
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"secret file {path} can be read by others; chmod 600 it")
        return file.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read secret file {path}: {error.strerror}") from error


def load_keyring(settings: ClusterSettings, sender: str, key_file: str = "") -> Keyring:
    """The keys of one process: its secret file, its own Ed25519 key, the members' public keys.

    `key_file`: default `<name>.key` beside the secret file. Raises ConfigError.
    """
    if not settings.secret_file:
        raise ConfigError("secret_file is not set in the cluster file; control messages need keys")
    keyring = read_keyring(_read_private(settings.secret_file), settings.secret_file)
    public = {
        coordinator_principal(peer.name): public_keys(peer.public_keys, f"coordinator {peer.name}")
        for peer in settings.coordinators
        if peer.public_keys
    }
    own = coordinator_principal(CoordinatorId(sender))
    if own not in public:
        return keyring.with_identities(None, public)
    path = key_file or str(Path(settings.secret_file).with_name(f"{sender}.key"))
    return keyring.with_identities((own, private_key(_read_private(path), path)), public)


class ControlLink:
    """What a process says and hears over DDS."""

    def __init__(
        self,
        settings: ClusterSettings,
        sender: str,
        incarnation: Incarnation,
        *,
        own_port: int,
        reads: tuple[DdsTopic, ...],
        writes: tuple[DdsTopic, ...],
        receive: Callable[[list[ControlBody]], None],
        now_ms: Callable[[], int],
        only_key: str = "",
        key_file: str = "",
        domain: LocalDomain | None = None,
        addresses: PeerAddresses | None = None,
    ) -> None:
        """`only_key`: drop other instances unread (DDS writes go to every matched reader).
        `key_file`: a coordinator's Ed25519 key, see `load_keyring`. `domain`: shared with others
        of this process (simulated nodes); else one of its own. `addresses`: how names are resolved.

        Raises ConfigError, PlatformFaultError.
        """
        self._settings = settings
        self._key_file = key_file
        self._own_port = own_port
        self._sender = sender
        self._departed: dict[CoordinatorPeer, int] = {}
        self._secret_file = Path(settings.secret_file)
        keyring = self._load()
        self._read_at = self._secret_file.stat().st_mtime_ns
        self._check_at_ms = 0
        self._sealer = Sealer(sender, incarnation, keyring)
        self._opener = Opener(keyring)
        self._receive = receive
        self._now_ms = now_ms
        self._only_key = only_key
        self._unreadable = 0
        self._quiet_until_ms: dict[str, int] = {}
        self._reads, self._writes = reads, writes
        self._addresses = addresses or PeerAddresses()
        self._targets: frozenset[str] = frozenset()
        self._moved: asyncio.Event | None = None
        self._last_words: dict[tuple[str, str], tuple[DdsTopic, ControlBody, int]] = {}
        self._past: Counter[str] = Counter()
        self._own_domain: LocalDomain | None = None
        if domain is None:
            self._targets = self._addresses.look_up(self._peers())
            domain = self._open_domain()
        self._bus = self._open_bus(domain)

    def _peers(self) -> Members:
        """Whom this process calls."""
        mine = self._sender if self._own_port else ""
        return tuple(peer for peer in self._settings.coordinators if peer.name != mine)

    def _load(self) -> Keyring:
        known = replace(
            self._settings, coordinators=(*self._settings.coordinators, *self._departed)
        )
        return load_keyring(known, self._sender, self._key_file)

    def _open_domain(self) -> LocalDomain:
        xml = domain_xml(self._settings.dds, self._targets, self._own_port)
        self._own_domain = LocalDomain(xml)
        return self._own_domain

    def _open_bus(self, domain: LocalDomain) -> Bus:
        return Bus(
            domain, self._reads, self._writes, self._deliver,
            shards=self._settings.dds.intent_shards, own_name=self._only_key or self._sender,
            addressees=tuple(peer.name for peer in self._settings.coordinators),
            on_failure=self._wake_up,
        )  # fmt: skip

    def start(self) -> None:
        """Starts receiving on the running loop."""
        self._moved = asyncio.Event()
        self._bus.start()

    # --- who and where the coordinators are ---------------------------------------------------

    def follow(self, members: Members) -> None:
        """These are the coordinators now: their keys count at once, `mind_peers` calls them."""
        now_ms = self._now_ms()
        names = {peer.name for peer in members}
        for peer in self._settings.coordinators:
            if peer.name not in names:
                self._departed[peer] = now_ms + DEPARTED_MS
        self._departed = {p: until for p, until in self._departed.items() if p.name not in names}
        self._settings = replace(self._settings, coordinators=members)
        self._bus.address(names)
        self._take_keys()
        self._wake_up()

    def _wake_up(self) -> None:
        """`mind_peers` has something to look at."""
        if self._moved is not None:
            self._moved.set()

    async def mind_peers(self) -> None:
        """Looks where the coordinators are, for ever; joins DDS anew where one is elsewhere.

        Raises PlatformFaultError where it cannot join, or hears nothing any more: the process has
        to end.
        """
        loop = asyncio.get_running_loop()
        while self._moved is not None and self._own_domain is not None:
            if self._bus.failure is not None:
                raise PlatformFaultError(f"control messages are not read: {self._bus.failure!r}")
            targets = await loop.run_in_executor(None, self._addresses.look_up, self._peers())
            if not targets <= self._targets:
                self._rejoin(targets)
            with suppress(TimeoutError):
                async with asyncio.timeout(RESOLVE_EVERY_S):
                    await self._moved.wait()
            self._moved.clear()

    def _rejoin(self, targets: frozenset[str]) -> None:
        """Leaves the domain and joins it with other peers. What was last said of lasting things
        (transient-local) is said again: it went with the writer."""
        if self._own_domain is None:
            return
        log.info("joining DDS anew", extra={"peers": sorted(targets)})
        self._past.update(self._bus_counts(), received=self._bus.received)
        self._bus.close()
        self._own_domain.close()
        self._targets = targets
        self._bus = self._open_bus(self._open_domain())
        self._bus.start()
        for topic, body, term in list(self._last_words.values()):
            self.send(topic, body, term)

    # --- what is said and heard ---------------------------------------------------------------

    def send(self, topic: DdsTopic, body: ControlBody, term: int = 0, to: str = "") -> None:
        """Signs and writes. Never blocks; what is lost on the way is the caller's to repeat.

        `to`: of an addressed topic, the coordinator it is for; "" for everybody.
        """
        now_ms = self._now_ms()
        self._renew_keys(now_ms)
        key = instance_key(body)
        if topic.transient_local:
            self._last_words[topic.name, key] = (topic, body, term)
        own_keys = self._sealer.keyring.has_public_keys
        principal = topic.principal(key, self._sender, own_keys=own_keys)
        message = self._sealer.seal(
            topic.name, key, principal, Term(term), encode_body(body), now_ms
        )
        self._bus.publish(topic, message, to)

    def close(self) -> None:
        """Leaves the domain."""
        self._bus.close()
        if self._own_domain is not None:
            self._own_domain.close()
            self._own_domain = None

    @property
    def received(self) -> int:
        """Messages that reached this process, whoever they were for."""
        return self._past["received"] + self._bus.received

    def _bus_counts(self) -> dict[str, int]:
        return {
            "write-failed": self._bus.write_failures,
            "incompatible-qos": self._bus.incompatible_qos,
        }

    def counts(self) -> dict[str, int]:
        """Refused messages by reason, and failures of the bus, since the start."""
        return {
            **{str(reason): count for reason, count in self._opener.refused.items()},
            "unreadable": self._unreadable,
            **{name: self._past[name] + count for name, count in self._bus_counts().items()},
        }

    def _renew_keys(self, now_ms: int) -> None:
        """Reads a changed secret file again: rotation needs no restart. A bad file is not taken."""
        if now_ms < self._check_at_ms:
            return
        self._check_at_ms = now_ms + KEYS_CHECK_MS
        gone = [peer for peer, until_ms in self._departed.items() if until_ms <= now_ms]
        for peer in gone:
            del self._departed[peer]
        try:
            changed = self._secret_file.stat().st_mtime_ns != self._read_at
        except OSError as error:
            log.warning("secret file not read", extra={"reason": str(error)})
            return
        if changed or gone:
            self._take_keys()

    def _take_keys(self) -> None:
        """The keys as file and membership are now; what cannot be read leaves those in use."""
        try:
            read_at = self._secret_file.stat().st_mtime_ns
            keyring = self._load()
        except (ConfigError, OSError) as error:
            log.warning("keys not taken; those in use stay", extra={"reason": str(error)})
            return
        self._read_at = read_at
        self._sealer.keyring = self._opener.keyring = keyring
        log.info("keys read again", extra={"file": str(self._secret_file)})

    def _deliver(self, messages: list[Message]) -> None:
        bodies = [body for message in messages if (body := self._opened(message)) is not None]
        self._renew_keys(self._now_ms())
        if bodies:
            self._receive(bodies)

    def _opened(self, message: Message) -> ControlBody | None:
        """As `_open`; a message that shows a bug of ours costs none of those beside it."""
        try:
            return self._open(message)
        except Exception:
            self._unreadable += 1
            if self._may_log("bug"):
                log.exception("a bug in opening a control message")
            return None

    def _may_log(self, what: str) -> bool:
        """One line of a kind in a period: a stranger must not fill the disk with logs."""
        now_ms = self._now_ms()
        if now_ms < self._quiet_until_ms.get(what, 0):
            return False
        self._quiet_until_ms[what] = now_ms + REFUSALS_LOG_MS
        return True

    def _tell_refused(self, refusal: str, topic: DdsTopic, message: Message) -> None:
        """Every refusal is counted; the log gets one line per reason and period."""
        if not self._may_log(refusal):
            return
        log.warning(
            "control message refused",
            extra={
                "reason": refusal,
                "topic": topic.name,
                "sender": message.sender[:64],
                "count": self._opener.refused,
            },
        )

    def _open(self, message: Message) -> ControlBody | None:
        if message.sender == self._sender or (self._only_key and message.key != self._only_key):
            return None
        topic = _TOPICS[message.topic]
        own_keys = self._opener.keyring.has_public_keys
        expected = topic.principal(message.key, message.sender, own_keys=own_keys)
        if topic.body in _OF_NODES and message.sender != message.key:
            self._tell_refused(self._opener.refuse("wrong-principal"), topic, message)
            return None  # before this sender is remembered
        refusal = self._opener.open(message, expected, self._now_ms())
        if refusal is not None:
            self._tell_refused(refusal, topic, message)
            return None
        try:
            body = decode_body(message.body, topic.body)
        except InvalidRecordError as error:
            self._unreadable += 1
            if self._may_log("unreadable"):
                log.warning("control message unreadable", extra={"reason": str(error)})
            return None
        if instance_key(body) != message.key or claimed_sender(body) not in (None, message.sender):
            self._unreadable += 1
            if self._may_log("foreign"):
                log.warning("control message in a foreign name", extra={"key": message.key[:64]})
            return None
        return body
