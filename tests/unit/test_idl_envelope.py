"""The signed envelope: what is believed, what is refused, and that refusals are counted."""

from dataclasses import replace
from itertools import pairwise

import pytest

from idl import keys
from idl.envelope import FRESH_MS, Message, Opener, Refusal, Sealer
from idl.errors import ConfigError
from idl.ids import CoordinatorId, Incarnation, NodeId, Term
from idl.keys import (
    COORDINATORS,
    KEY_BYTES,
    Keyring,
    Principal,
    coordinator_principal,
    new_private_key,
    node_key_lines,
    node_principal,
    private_key,
    public_keys,
    read_keyring,
)

SECRET = b"s" * 32
NOW = 1_000_000


def sealed(seq: int = 1, incarnation: int = 7, body: str = "{}") -> Message:
    sealer = Sealer("c1", Incarnation(incarnation), Keyring((SECRET,)))
    for _ in range(seq):
        message = sealer.seal("ballot", "role", COORDINATORS, Term(3), body, NOW)
    return message


def test_what_was_sealed_is_believed_once() -> None:
    opener = Opener(Keyring((SECRET,)))
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
    opener = Opener(Keyring((SECRET,)))
    forged = replace(sealed(), **change)  # type: ignore[arg-type] # a table of fields
    assert opener.open(forged, COORDINATORS, NOW) == refusal
    assert opener.open(sealed(), COORDINATORS, NOW) is None, "a forgery must not block the real one"


def test_fields_cannot_be_shifted_into_each_other() -> None:
    one = Message("t", "ab", "c", 1, "p", 1, 1, 1, "x")
    other = Message("t", "a", "bc", 1, "p", 1, 1, 1, "x")
    assert one.signed_bytes() != other.signed_bytes()


def test_an_older_incarnation_is_a_replay() -> None:
    opener = Opener(Keyring((SECRET,)))
    assert opener.open(sealed(incarnation=8), COORDINATORS, NOW) is None
    assert opener.open(sealed(seq=5, incarnation=7), COORDINATORS, NOW) == "replayed"
    assert opener.open(sealed(seq=1, incarnation=9), COORDINATORS, NOW) is None


def test_an_old_message_is_not_believed_by_a_fresh_receiver() -> None:
    late = NOW + FRESH_MS + 1
    assert Opener(Keyring((SECRET,))).open(sealed(), COORDINATORS, late) == "not-fresh"


def test_a_node_can_sign_for_itself_only() -> None:
    own = node_principal(NodeId("n1"))
    lines = node_key_lines(SECRET.hex(), "file", NodeId("n1"))
    node = Sealer("n1", Incarnation(1), read_keyring(lines, "file"))
    message = node.seal("status", "n1", own, Term(1), "{}", NOW)
    assert Opener(Keyring((SECRET,))).open(message, own, NOW) is None
    with pytest.raises(ConfigError, match="no key"):
        node.seal("ballot", "role", COORDINATORS, Term(1), "{}", NOW)
    other = node_principal(NodeId("n2"))
    assert Opener(Keyring((SECRET,))).open(message, other, NOW) == "wrong-principal"
    assert Opener(Keyring((b"t" * 32,))).open(message, own, NOW) == "bad-signature"


def test_secrets_rotate_without_a_moment_of_disagreement() -> None:
    """Each step of the rotation, the process before it and the one after it hear each other."""
    old, new = "aa" * 32, "bb" * 32
    steps = [old, f"{old}\n{new}", f"{new}\n{old}", new]
    rings = [read_keyring(step, "file") for step in steps]
    principal = node_principal(NodeId("n1"))
    for earlier, later in pairwise(rings):
        for one, other in ((earlier, later), (later, earlier)):
            tag = one.sign(principal, b"data")
            assert tag is not None
            assert other.verify(principal, b"data", tag)
    stale = rings[0].sign(principal, b"data")
    assert stale is not None
    assert rings[3].verify(principal, b"data", stale) is False


def _coordinators() -> tuple[Keyring, Keyring, Principal, Principal]:
    """Two members that know the same cluster secret and each other's public keys."""
    names = [coordinator_principal(CoordinatorId(name)) for name in ("c1", "c2")]
    pairs = [new_private_key() for _ in names]
    public = {name: public_keys((pair[1],), name) for name, pair in zip(names, pairs, strict=True)}
    rings = [
        Keyring((SECRET,)).with_identities((name, private_key(pair[0], name)), public)
        for name, pair in zip(names, pairs, strict=True)
    ]
    return rings[0], rings[1], names[0], names[1]


def test_a_coordinator_cannot_vote_for_another() -> None:
    one, two, name1, name2 = _coordinators()
    ballot = Sealer("c1", Incarnation(1), one).seal("b", "r", name1, Term(1), "{}", NOW)
    assert Opener(two).open(ballot, name1, NOW) is None
    with pytest.raises(ConfigError, match="no key"):
        Sealer("c2", Incarnation(1), one).seal("b", "r", name2, Term(1), "{}", NOW)
    forged = replace(ballot, sender="c2", principal=name2)
    assert Opener(two).open(forged, name2, NOW) == "bad-signature"
    mac = Sealer("c1", Incarnation(1), Keyring((SECRET,))).seal(
        "b", "r", COORDINATORS, Term(1), "{}", NOW
    )
    assert Opener(two).open(mac, name1, NOW) == "wrong-principal", "no downgrade to the shared key"
    assert Opener(two).open(replace(ballot, tag="not hex"), name1, NOW) == "bad-signature"


@pytest.mark.parametrize("text", ["", "zz", "abcd", "a b c", "\n".join(["aa" * 32] * 9)])
def test_a_bad_secret_file_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="file"):
        read_keyring(text, "file")


def test_a_strangers_tag_of_any_characters_is_a_bad_signature_and_no_error() -> None:
    keyring = Keyring((b"k" * KEY_BYTES,))
    for tag in ("ä", "\udcff", "", "x" * 100_000):
        assert keyring.verify(node_principal(NodeId("n1")), b"data", tag) is False


def test_keys_of_names_that_strangers_make_up_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "DERIVED_MAX", 10)
    keyring = Keyring((b"k" * KEY_BYTES,))
    data, mine = b"data", node_principal(NodeId("n1"))
    tag = keyring.sign(mine, data)
    assert tag is not None
    for number in range(100):
        assert keyring.verify(node_principal(NodeId(f"x{number}")), data, tag) is False
    assert len(keyring._derived) <= 10
    assert keyring.verify(node_principal(NodeId("x" * 60_000)), data, tag) is None
    assert keyring.verify(mine, data, tag) is True
