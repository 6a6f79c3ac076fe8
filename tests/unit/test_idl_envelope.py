"""The signed envelope: what is believed, what is refused, and that refusals are counted."""

from dataclasses import replace

import pytest

from idl.envelope import (
    COORDINATORS,
    FRESH_MS,
    Keyring,
    Message,
    Opener,
    Refusal,
    Sealer,
    node_principal,
    read_keyring,
)  # fmt: skip
from idl.errors import ConfigError
from idl.ids import Incarnation, NodeId, Term

SECRET = b"s" * 32
NOW = 1_000_000


def sealed(seq: int = 1, incarnation: int = 7, body: str = "{}") -> Message:
    sealer = Sealer("c1", Incarnation(incarnation), Keyring(SECRET))
    for _ in range(seq):
        message = sealer.seal("ballot", "role", COORDINATORS, Term(3), body, NOW)
    return message


def test_what_was_sealed_is_believed_once() -> None:
    opener = Opener(Keyring(SECRET))
    assert opener.open(sealed(), COORDINATORS, NOW) is None
    assert opener.open(sealed(), COORDINATORS, NOW) == "replayed"
    assert opener.refused == {"replayed": 1}


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"tag": ""}, "unsigned"),
        ({"tag": "00" * 16}, "bad-signature"),
        ({"body": '{"term":9}'}, "bad-signature"),
        ({"term": 4}, "bad-signature"),
        ({"seq": 99}, "bad-signature"),
        ({"topic": "beacon"}, "bad-signature"),
        ({"key": "other"}, "bad-signature"),
        ({"sender": "c2"}, "bad-signature"),
        ({"principal": "node/n1"}, "wrong-principal"),
    ],
)
def test_a_changed_message_is_refused(change: dict[str, object], refusal: Refusal) -> None:
    opener = Opener(Keyring(SECRET))
    forged = replace(sealed(), **change)  # type: ignore[arg-type] # a table of fields
    assert opener.open(forged, COORDINATORS, NOW) == refusal
    assert opener.open(sealed(), COORDINATORS, NOW) is None, "a forgery must not block the real one"


def test_fields_cannot_be_shifted_into_each_other() -> None:
    one = Message("t", "ab", "c", 1, "p", 1, 1, 1, "x")
    other = Message("t", "a", "bc", 1, "p", 1, 1, 1, "x")
    assert one.signed_bytes() != other.signed_bytes()


def test_an_older_incarnation_is_a_replay() -> None:
    opener = Opener(Keyring(SECRET))
    assert opener.open(sealed(incarnation=8), COORDINATORS, NOW) is None
    assert opener.open(sealed(seq=5, incarnation=7), COORDINATORS, NOW) == "replayed"
    assert opener.open(sealed(seq=1, incarnation=9), COORDINATORS, NOW) is None


def test_an_old_message_is_not_believed_by_a_fresh_receiver() -> None:
    late = NOW + FRESH_MS + 1
    assert Opener(Keyring(SECRET)).open(sealed(), COORDINATORS, late) == "not-fresh"


def test_a_node_can_sign_for_itself_only() -> None:
    own = node_principal(NodeId("n1"))
    key = Keyring(SECRET).key(own)
    assert key is not None
    node = Sealer("n1", Incarnation(1), read_keyring(f"{own} {key.hex()}\nx 00", "file"))
    message = node.seal("status", "n1", own, Term(1), "{}", NOW)
    assert Opener(Keyring(SECRET)).open(message, own, NOW) is None
    with pytest.raises(ConfigError, match="no key"):
        node.seal("ballot", "role", COORDINATORS, Term(1), "{}", NOW)
    other = node_principal(NodeId("n2"))
    assert Opener(Keyring(SECRET)).open(message, other, NOW) == "wrong-principal"
    assert Opener(Keyring(b"t" * 32)).open(message, own, NOW) == "bad-signature"


@pytest.mark.parametrize("text", ["", "zz", "abcd", "a b c"])
def test_a_bad_secret_file_says_so(text: str) -> None:
    with pytest.raises(ConfigError):
        read_keyring(text, "file").key(COORDINATORS)
        if not text:
            raise ConfigError("empty file gives no key")
