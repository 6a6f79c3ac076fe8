"""Keys of control messages: who may sign as whom, and what a receiver can check (ADR 0003).

Two kinds of principal. `node/<name>` and `coordinators` share a symmetric key derived from the
cluster secret (HKDF, RFC 5869), checked by a keyed BLAKE2b tag (RFC 7693): under 1 µs.
`coordinator/<name>` signs with Ed25519 (RFC 8032) what one coordinator must not be able to say for
another: votes, replies, leader claims.

Rotation without downtime: a secret file may hold several secrets, one per line, and a coordinator
several public keys. The first signs, all verify. Add the new one second everywhere, then make it
first everywhere, then remove the old one everywhere.
"""

import hashlib
import hmac
from typing import Final, NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from idl.errors import ConfigError
from idl.ids import CoordinatorId, NodeId

Principal = NewType("Principal", str)
COORDINATORS: Final = Principal("coordinators")
"""Any coordinator: used for votes only where the cluster file gives no public keys."""

PRINCIPAL_CHARS_MAX: Final = 200
"""Longer than any that there can be: a name has 128."""
DERIVED_MAX: Final = 20_000
"""Keys kept: a stranger may ask for as many as he has names for."""
KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
GENERATIONS_MAX: Final = 4
"""Secrets or public keys valid at once: a rotation needs two; more would only slow refusals."""


def node_principal(node: NodeId) -> Principal:
    """The principal of one node agent."""
    return Principal(f"node/{node}")


def coordinator_principal(name: CoordinatorId) -> Principal:
    """The principal of one coordinator, with an Ed25519 key of its own."""
    return Principal(f"coordinator/{name}")


def _derive(secret: bytes, principal: Principal) -> bytes:
    info = b"outrider control v1 " + principal.encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def _tag(key: bytes, data: bytes) -> str:
    return hashlib.blake2b(data, key=key, digest_size=TAG_BYTES).hexdigest()


class Keyring:
    """The keys one process has. Newest first in every list."""

    def __init__(
        self,
        secrets: tuple[bytes, ...] = (),
        known: dict[Principal, tuple[bytes, ...]] | None = None,
        own: tuple[Principal, Ed25519PrivateKey] | None = None,
        public: dict[Principal, tuple[Ed25519PublicKey, ...]] | None = None,
    ) -> None:
        """`secrets`: cluster secrets; `known`: keys of a node that has no cluster secret; `own`
        and `public`: Ed25519."""
        self._secrets = secrets
        self._known = dict(known or {})
        self._derived: dict[Principal, tuple[bytes, ...]] = {}
        self._own = own
        self._public = dict(public or {})

    @property
    def has_public_keys(self) -> bool:
        """Coordinators sign with keys of their own."""
        return bool(self._public)

    def with_identities(
        self,
        own: tuple[Principal, Ed25519PrivateKey] | None,
        public: dict[Principal, tuple[Ed25519PublicKey, ...]],
    ) -> "Keyring":
        """The same symmetric keys, with these Ed25519 keys."""
        return Keyring(self._secrets, self._known, own, public)

    def sign(self, principal: Principal, data: bytes) -> str | None:
        """The tag; None where this process cannot sign as `principal`."""
        if self._own is not None and principal == self._own[0]:
            return self._own[1].sign(data).hex()
        keys = self._symmetric(principal)
        return _tag(keys[0], data) if keys else None

    def verify(self, principal: Principal, data: bytes, tag: str) -> bool | None:
        """Whether `principal` made this tag; None where this process has no key to tell."""
        public = self._public.get(principal)
        if public is not None:
            return any(_verifies(key, data, tag) for key in public)
        keys = self._symmetric(principal)
        if not keys:
            return None
        given = tag.encode("utf-8", "surrogatepass")  # a stranger's text: any characters
        return any(hmac.compare_digest(_tag(key, data).encode(), given) for key in keys)

    def _symmetric(self, principal: Principal) -> tuple[bytes, ...]:
        if principal.startswith("coordinator/") or len(principal) > PRINCIPAL_CHARS_MAX:
            return ()
        found = self._known.get(principal) or self._derived.get(principal)
        if found is None:
            found = tuple(_derive(secret, principal) for secret in self._secrets)
            if len(self._derived) >= DERIVED_MAX:
                self._derived.clear()  # whoever is real is derived again, in microseconds
            self._derived[principal] = found
        return found


def _verifies(key: Ed25519PublicKey, data: bytes, tag: str) -> bool:
    try:
        key.verify(bytes.fromhex(tag), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _secret(text: str, where: str) -> bytes:
    secret = bytes.fromhex(text)
    if len(secret) < KEY_BYTES:
        raise ConfigError(f"{where}: a secret is shorter than {KEY_BYTES} bytes")
    return secret


def read_keyring(text: str, where: str) -> Keyring:
    """A secret file: lines of hex (cluster secrets, the one that signs first), or lines
    `principal hex` (keys of a node). Raises ConfigError.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= GENERATIONS_MAX:
        raise ConfigError(f"{where} holds {len(lines)} keys; it may have 1 to {GENERATIONS_MAX}")
    try:
        if all(len(words) == 1 for words in lines):
            return Keyring(tuple(_secret(words[0], where) for words in lines))
        known: dict[Principal, tuple[bytes, ...]] = {}
        for name, key in lines:
            principal = Principal(name)
            known[principal] = (*known.get(principal, ()), _secret(key, where))
        return Keyring(known=known)
    except ValueError as error:
        raise ConfigError(
            f"{where} is neither lines of hex nor lines of 'principal hex'; "
            "make one with `outrider keys secret`"
        ) from error


def node_key_lines(text: str, where: str, node: NodeId) -> str:
    """What a node's own secret file holds: its keys alone, newest first. Raises ConfigError."""
    principal = node_principal(node)
    secrets = [_secret(line.strip(), where) for line in text.splitlines() if line.strip()]
    return "".join(f"{principal} {_derive(secret, principal).hex()}\n" for secret in secrets)


def new_private_key() -> tuple[str, str]:
    """A fresh Ed25519 key pair: (private seed, public key), both hex."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw().hex(), key.public_key().public_bytes_raw().hex()


def private_key(text: str, where: str) -> Ed25519PrivateKey:
    """From the hex of a key file. Raises ConfigError."""
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text.strip()))
    except ValueError as error:
        raise ConfigError(
            f"{where} is not an Ed25519 private key in hex; "
            "make one with `outrider keys coordinator`"
        ) from error


def public_keys(texts: tuple[str, ...], where: str) -> tuple[Ed25519PublicKey, ...]:
    """From the hex in the cluster file. Raises ConfigError."""
    if len(texts) > GENERATIONS_MAX:
        raise ConfigError(f"{where} has {len(texts)} public keys, at most {GENERATIONS_MAX}")
    try:
        return tuple(Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)) for text in texts)
    except ValueError as error:
        raise ConfigError(f"{where} has a public key that is not 32 bytes of hex") from error
