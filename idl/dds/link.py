"""The control link of one process: typed bodies in and out, signed and checked on the way.

Joins bus, envelope and codec, so that neither coordinator nor agent sees an unsigned byte.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

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
from idl.dds.topics import ALL, DdsTopic
from idl.envelope import Message, Opener, Sealer
from idl.errors import ConfigError, InvalidRecordError
from idl.ids import CoordinatorId, Incarnation, Term
from idl.keys import Keyring, coordinator_principal, private_key, public_keys, read_keyring
from idl.settings import ClusterSettings

log = logging.getLogger(__name__)

REFUSALS_LOG_MS: Final = 10_000
"""One log line per reason in this time: a stranger must not be able to fill the disk with logs."""
KEYS_CHECK_MS: Final = 2_000
"""How often a changed secret file is looked for."""

_TOPICS: Final = {topic.name: topic for topic in ALL}


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
    ) -> None:
        """`only_key`: drop other instances unread (DDS writes go to every matched reader).
        `key_file`: a coordinator's Ed25519 key, see `load_keyring`. `domain`: shared with others
        of this process (simulated nodes); else one of its own.

        Raises ConfigError, PlatformFaultError.
        """
        self._load = partial(load_keyring, settings, sender, key_file)
        self._secret_file = Path(settings.secret_file)
        keyring = self._load()
        self._read_at = self._secret_file.stat().st_mtime_ns
        self._check_at_ms = 0
        self._sealer = Sealer(sender, incarnation, keyring)
        self._opener = Opener(keyring)
        self._sender = sender
        self._receive = receive
        self._now_ms = now_ms
        self._only_key = only_key
        self._unreadable = 0
        self._quiet_until_ms: dict[str, int] = {}
        self._own_domain = None
        if domain is None:
            xml = domain_xml(settings.dds, settings.coordinators, own_port)
            domain = self._own_domain = LocalDomain(xml)
        self._bus = Bus(
            domain,
            reads,
            writes,
            self._deliver,
            shards=settings.dds.intent_shards,
            own_key=only_key,
        )

    def start(self) -> None:
        """Starts receiving on the running loop."""
        self._bus.start()

    def send(self, topic: DdsTopic, body: ControlBody, term: int = 0) -> None:
        """Signs and writes. Never blocks; what is lost on the way is the caller's to repeat."""
        now_ms = self._now_ms()
        self._renew_keys(now_ms)
        key = instance_key(body)
        own_keys = self._sealer.keyring.has_public_keys
        principal = topic.principal(key, self._sender, own_keys=own_keys)
        message = self._sealer.seal(
            topic.name, key, principal, Term(term), encode_body(body), now_ms
        )
        self._bus.publish(topic, message)

    def close(self) -> None:
        """Leaves the domain."""
        self._bus.close()
        if self._own_domain is not None:
            self._own_domain.close()
            self._own_domain = None

    @property
    def received(self) -> int:
        """Messages that reached this process, whoever they were for."""
        return self._bus.received

    def counts(self) -> dict[str, int]:
        """Refused messages by reason, and failures of the bus, since the start."""
        return {
            **{str(reason): count for reason, count in self._opener.refused.items()},
            "unreadable": self._unreadable,
            "write-failed": self._bus.write_failures,
            "incompatible-qos": self._bus.incompatible_qos,
        }

    def _renew_keys(self, now_ms: int) -> None:
        """Reads a changed secret file again: rotation needs no restart. A bad file is not taken."""
        if now_ms < self._check_at_ms:
            return
        self._check_at_ms = now_ms + KEYS_CHECK_MS
        try:
            changed = self._secret_file.stat().st_mtime_ns
            if changed == self._read_at:
                return
            keyring = self._load()
        except (ConfigError, OSError) as error:
            log.warning("secret file not taken; the keys in use stay", extra={"reason": str(error)})
            return
        self._read_at = changed
        self._sealer.keyring = self._opener.keyring = keyring
        log.info("keys read again", extra={"file": str(self._secret_file)})

    def _deliver(self, messages: list[Message]) -> None:
        bodies = [body for message in messages if (body := self._open(message)) is not None]
        self._renew_keys(self._now_ms())
        if bodies:
            self._receive(bodies)

    def _tell_refused(self, refusal: str, topic: DdsTopic, message: Message) -> None:
        """Every refusal is counted; the log gets one line per reason and period."""
        now_ms = self._now_ms()
        if now_ms < self._quiet_until_ms.get(refusal, 0):
            return
        self._quiet_until_ms[refusal] = now_ms + REFUSALS_LOG_MS
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
        refusal = self._opener.open(message, expected, self._now_ms())
        if refusal is not None:
            self._tell_refused(refusal, topic, message)
            return None
        try:
            body = decode_body(message.body, topic.body)
        except InvalidRecordError as error:
            self._unreadable += 1
            log.warning("control message unreadable", extra={"reason": str(error)})
            return None
        if instance_key(body) != message.key or claimed_sender(body) not in (None, message.sender):
            self._unreadable += 1
            log.warning("control message in a foreign name", extra={"key": message.key[:64]})
            return None
        return body
