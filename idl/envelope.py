"""The signed envelope of every control message (ADR 0003). Pure: time is a parameter.

The Cyclone DDS wheel has no DDS Security, so each message carries a tag over everything in it
(`idl.keys`: who signs with what). Refused messages are counted, not raised: a stranger on the
network must not be able to stop a process.
"""

from dataclasses import dataclass, field, replace
from typing import Final, Literal

from idl.errors import ConfigError
from idl.ids import Incarnation, Term
from idl.keys import Keyring, Principal

FRESH_MS: Final = 60_000
"""How far a sender's clock may be from ours: bounds what a receiver that just started, and so
remembers nothing, can be told again. Safety rests on terms and attempts, never on this."""

Refusal = Literal["unsigned", "wrong-principal", "bad-signature", "replayed", "not-fresh"]


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


class Sealer:
    """Signs what this process sends. `seq` grows over all its messages and never restarts within
    an incarnation."""

    def __init__(self, sender: str, incarnation: Incarnation, keyring: Keyring) -> None:
        self.sender = sender
        self.incarnation = incarnation
        self.keyring = keyring
        self._seq = 0

    def seal(
        self, topic: str, key: str, principal: Principal, term: Term, body: str, now_ms: int
    ) -> Message:
        """A signed message. Raises ConfigError where this process lacks the principal's key."""
        self._seq += 1
        unsigned = Message(
            topic=topic, key=key, sender=self.sender, incarnation=self.incarnation,
            principal=principal, term=term, seq=self._seq, at_ms=now_ms, body=body,
        )  # fmt: skip
        tag = self.keyring.sign(principal, unsigned.signed_bytes())
        if tag is None:
            raise ConfigError(f"this process has no key for {principal!r}; check its secret file")
        return replace(unsigned, tag=tag)


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
        return None if refusal is None else self.refuse(refusal)

    def refuse(self, why: Refusal) -> Refusal:
        """Counts it."""
        self.refused[why] = self.refused.get(why, 0) + 1
        return why

    def _judge(self, message: Message, expected: Principal, now_ms: int) -> Refusal | None:
        if not message.tag:
            return "unsigned"
        if message.principal != expected:
            return "wrong-principal"
        verified = self.keyring.verify(expected, message.signed_bytes(), message.tag)
        if verified is None:
            return "wrong-principal"
        if not verified:
            return "bad-signature"
        stream = (message.topic, message.principal, message.sender, message.key)
        position = (message.incarnation, message.seq)
        if position <= self._seen.get(stream, (0, 0)):
            return "replayed"
        if abs(now_ms - message.at_ms) > FRESH_MS:
            return "not-fresh"
        self._seen[stream] = position
        return None
