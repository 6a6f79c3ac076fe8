"""The control link of one process: typed bodies in and out, signed and checked on the way.

Joins bus, envelope and codec, so that neither coordinator nor agent sees an unsigned byte.
"""

import logging
from collections.abc import Callable
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
from idl.dds.bus import Bus
from idl.dds.domain import domain_xml
from idl.dds.topics import ALL, DdsTopic
from idl.envelope import Keyring, Message, Opener, Sealer, read_keyring
from idl.errors import ConfigError, InvalidRecordError
from idl.ids import Incarnation, Term
from idl.settings import ClusterSettings

log = logging.getLogger(__name__)

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


def load_keyring(path: str) -> Keyring:
    """The keys in a secret file. Raises ConfigError, also where others may read the file."""
    if not path:
        raise ConfigError("secret_file is not set in the cluster file; control messages need keys")
    file = Path(path)
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"secret file {path} can be read by others; chmod 600 it")
        return read_keyring(file.read_text(), path)
    except OSError as error:
        raise ConfigError(f"cannot read secret file {path}: {error.strerror}") from error


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
    ) -> None:
        """`only_key`: drop other instances unread (DDS writes go to every matched reader).

        Raises ConfigError, PlatformFaultError.
        """
        keyring = load_keyring(settings.secret_file)
        self._sealer = Sealer(sender, incarnation, keyring)
        self._opener = Opener(keyring)
        self._sender = sender
        self._receive = receive
        self._now_ms = now_ms
        self._only_key = only_key
        self._unreadable = 0
        xml = domain_xml(settings.dds, settings.coordinators, own_port)
        self._bus = Bus(xml, reads, writes, self._deliver)

    def start(self) -> None:
        """Starts receiving on the running loop."""
        self._bus.start()

    def send(self, topic: DdsTopic, body: ControlBody, term: int = 0) -> None:
        """Signs and writes. Never blocks; what is lost on the way is the caller's to repeat."""
        key = instance_key(body)
        message = self._sealer.seal(
            topic.name, key, topic.principal(key), Term(term), encode_body(body), self._now_ms()
        )
        self._bus.publish(message)

    def close(self) -> None:
        """Leaves the domain."""
        self._bus.close()

    def counts(self) -> dict[str, int]:
        """Refused messages by reason, and failures of the bus, since the start."""
        return {
            **{str(reason): count for reason, count in self._opener.refused.items()},
            "unreadable": self._unreadable,
            "write-failed": self._bus.write_failures,
            "incompatible-qos": self._bus.incompatible_qos,
        }

    def _deliver(self, messages: list[Message]) -> None:
        bodies = [body for message in messages if (body := self._open(message)) is not None]
        if bodies:
            self._receive(bodies)

    def _open(self, message: Message) -> ControlBody | None:
        if message.sender == self._sender or (self._only_key and message.key != self._only_key):
            return None
        topic = _TOPICS[message.topic]
        refusal = self._opener.open(message, topic.principal(message.key), self._now_ms())
        if refusal is not None:
            log.warning(
                "control message refused",
                extra={"reason": refusal, "topic": topic.name, "sender": message.sender[:64]},
            )
            return None
        try:
            body = decode_body(message.body, topic.body)
        except InvalidRecordError as error:
            self._unreadable += 1
            log.warning("control message unreadable", extra={"reason": str(error)})
            return None
        if instance_key(body) != message.key:
            self._unreadable += 1
            log.warning("control message under a foreign key", extra={"key": message.key[:64]})
            return None
        return body
