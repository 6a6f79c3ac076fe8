"""The signed envelope of every control message (ADR 0003). Pure: time is a parameter.

The Cyclone DDS wheel has no DDS Security, so each message carries a keyed BLAKE2b tag (RFC 7693)
over everything in it. Keys are derived per principal from the cluster secret by HKDF (RFC 5869):
a node holds only its own key and can forge nobody else. Refused messages are counted, not raised:
a stranger on the network must not be able to stop a process.
"""

import hashlib
import hmac
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NewType

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from idl.errors import ConfigError
from idl.ids import Incarnation, NodeId, Term

Principal = NewType("Principal", str)
COORDINATORS: Final = Principal("coordinators")
"""All coordinators share one key in this version; votes get Ed25519 keys of their own next."""

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
FRESH_MS: Final = 60_000
"""How far a sender's clock may be from ours: bounds what a receiver that just started, and so
remembers nothing, can be told again. Safety rests on terms and attempts, never on this."""

Refusal = Literal["unsigned", "wrong-principal", "bad-signature", "replayed", "not-fresh"]


def node_principal(node: NodeId) -> Principal:
    """The principal of one node agent."""
    return Principal(f"node/{node}")


@dataclass(frozen=True, slots=True)
class Message:
    """What travels on every DDS topic. `key` is the DDS instance (node, role or queue)."""

    topic: str
    key: str
    sender: str
    incarnation: int
    principal: str
    term: int
    seq: int
    at_ms: int
    body: str
    tag: str = ""

    def signed_bytes(self) -> bytes:
        """Every field but the tag, each after its length, so that no two messages agree."""
        fields = (
            self.topic, self.key, self.sender, str(self.incarnation), self.principal,
            str(self.term), str(self.seq), str(self.at_ms), self.body,
        )  # fmt: skip
        encoded = [item.encode() for item in fields]
        return b"".join(len(item).to_bytes(4, "big") + item for item in encoded)


class Keyring:
    """Keys of principals: derived from the cluster secret, or just the ones a node was given."""

    def __init__(self, secret: bytes | None, known: dict[Principal, bytes] | None = None) -> None:
        self._secret = secret
        self._known = dict(known or {})

    def key(self, principal: Principal) -> bytes | None:
        """The key, or None where this process must not have it."""
        if principal not in self._known and self._secret is not None:
            info = b"outrider control v1 " + principal.encode()
            derive = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info)
            self._known[principal] = derive.derive(self._secret)
        return self._known.get(principal)


def read_keyring(text: str, where: str) -> Keyring:
    """A secret file: one line of hex (cluster secret), or lines `principal hex` (keys of a node).

    Raises ConfigError.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    try:
        if len(lines) == 1 and len(lines[0]) == 1:
            secret = bytes.fromhex(lines[0][0])
            if len(secret) < KEY_BYTES:
                raise ConfigError(f"{where}: the secret is shorter than {KEY_BYTES} bytes")
            return Keyring(secret)
        return Keyring(None, {Principal(name): bytes.fromhex(key) for name, key in lines})
    except ValueError as error:
        raise ConfigError(
            f"{where} is neither one line of hex nor lines of 'principal hex'; "
            "make one with `outrider up` or `openssl rand -hex 32`"
        ) from error


def _tag(key: bytes, message: Message) -> str:
    return hashlib.blake2b(message.signed_bytes(), key=key, digest_size=TAG_BYTES).hexdigest()


class Sealer:
    """Signs what this process sends. `seq` grows over all its messages and never restarts within
    an incarnation."""

    def __init__(self, sender: str, incarnation: Incarnation, keyring: Keyring) -> None:
        self.sender = sender
        self.incarnation = incarnation
        self._keyring = keyring
        self._seq = 0

    def seal(
        self, topic: str, key: str, principal: Principal, term: Term, body: str, now_ms: int
    ) -> Message:
        """A signed message. Raises ConfigError where this process lacks the principal's key."""
        secret = self._keyring.key(principal)
        if secret is None:
            raise ConfigError(f"this process has no key for {principal!r}; check its secret file")
        self._seq += 1
        unsigned = Message(
            topic=topic, key=key, sender=self.sender, incarnation=self.incarnation,
            principal=principal, term=term, seq=self._seq, at_ms=now_ms, body=body,
        )  # fmt: skip
        return replace(unsigned, tag=_tag(secret, unsigned))


@dataclass(slots=True)
class Opener:
    """Verifies what this process receives and remembers what it has seen.

    Order of checks matters: only what is authentic may change the memory of sequence numbers.
    """

    keyring: Keyring
    refused: dict[Refusal, int] = field(default_factory=dict)
    _seen: dict[tuple[str, str, str, str], tuple[int, int]] = field(default_factory=dict)

    def open(self, message: Message, expected: Principal, now_ms: int) -> Refusal | None:
        """None where the message may be believed; else why not (already counted)."""
        refusal = self._judge(message, expected, now_ms)
        if refusal is not None:
            self.refused[refusal] = self.refused.get(refusal, 0) + 1
        return refusal

    def _judge(self, message: Message, expected: Principal, now_ms: int) -> Refusal | None:
        if not message.tag:
            return "unsigned"
        key = self.keyring.key(expected)
        if message.principal != expected or key is None:
            return "wrong-principal"
        if not hmac.compare_digest(_tag(key, message), message.tag):
            return "bad-signature"
        stream = (message.topic, message.principal, message.sender, message.key)
        position = (message.incarnation, message.seq)
        if position <= self._seen.get(stream, (0, 0)):
            return "replayed"
        if abs(now_ms - message.at_ms) > FRESH_MS:
            return "not-fresh"
        self._seen[stream] = position
        return None
