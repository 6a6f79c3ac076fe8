"""DDS types and configuration: the type equals the .idl text, the traps are handled."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from cyclonedds.core import Policy
from cyclonedds.idl._support import Endianness

from idl.dds import topics
from idl.dds.domain import discovery_port, domain_xml, participant_index, resolve
from idl.dds.peers import PeerAddresses
from idl.dds.types import Envelope, from_wire, to_wire
from idl.envelope import Message
from idl.errors import ConfigError
from idl.ids import CoordinatorId
from idl.members import CoordinatorPeer
from idl.settings import DdsSettings

IDL = Path(__file__).parents[2] / "idl" / "outrider.idl"
IDL_TYPES = {"str": "string", "int64": "int64"}


def test_the_python_type_is_the_idl_type() -> None:
    body = re.search(r"struct Envelope \{(.*?)\};", IDL.read_text(), re.DOTALL)
    assert body is not None
    text = re.sub(r"//.*", "", body[1])
    declared = re.findall(r"(@key )?(\w+) (\w+);", text)
    fields = [
        (
            "@key " if name == "key" else "",
            "string" if kind is str else str(kind.__metadata__[0]),
            name,
        )
        for name, kind in Envelope.__annotations__.items()
    ]
    assert declared == fields
    assert Envelope.__idl__.idl_transformed_typename == "outrider::Envelope"
    assert [n for n, f in Envelope.__idl_field_annotations__.items() if "key" in f] == ["key"]


def test_a_message_survives_the_wire_bytes() -> None:
    message = Message("t", "k", "s", 2**62, "p", 3, 4, 5, '{"ä": 1}', "tag")
    sample = Envelope.deserialize(to_wire(message).serialize())
    assert from_wire("t", sample) == message


def test_an_older_reader_takes_a_newer_type() -> None:
    """@appendable: a trailing field may be added, the one change that matches both ways."""
    assert Envelope.__idl_annotations__["extensibility"] == "appendable"


@pytest.mark.parametrize("topic", topics.ALL, ids=lambda t: t.name)
def test_no_writer_can_block_the_process(topic: topics.DdsTopic) -> None:
    qos = topic.qos()
    assert isinstance(qos[Policy.History], Policy.History.KeepLast)
    if topic.reliable:
        assert qos[Policy.Reliability].max_blocking_time == 0


def test_ports_are_those_of_the_rtps_mapping() -> None:
    assert discovery_port(0, 0) == 7410
    assert discovery_port(3, 2) == 7410 + 750 + 4
    assert participant_index(3, discovery_port(3, 2)) == 2
    for port in (7411, 7410 + 250, 7400):
        with pytest.raises(ConfigError, match="dds_port"):
            participant_index(0, port)


def peer(name: str, index: int) -> CoordinatorPeer:
    return CoordinatorPeer(name=CoordinatorId(name), dds_port=discovery_port(5, index))


def test_the_configuration_answers_the_traps() -> None:
    settings = DdsSettings(domain=5, tag="a<b", interface="127.0.0.1")
    peers = (peer("c1", 0), peer("c2", 1))
    root = ET.fromstring(
        domain_xml(settings, PeerAddresses().look_up(peers[1:]), peers[0].dds_port)
    )
    space = {"c": "https://cdds.io/config"}
    found = root.findall(".//c:Peer", space)
    assert [p.get("Address") for p in found] == [f"127.0.0.1:{peers[1].dds_port}"]
    assert {p.get("PruneDelay") for p in found} == {"inf"}
    assert root.findtext(".//c:ParticipantIndex", namespaces=space) == "0"
    assert root.findtext(".//c:AllowMulticast", namespaces=space) == "false"
    assert root.findtext(".//c:Tag", namespaces=space) == "a<b"
    agent = ET.fromstring(domain_xml(settings, PeerAddresses().look_up(peers), 0))
    assert len(agent.findall(".//c:Peer", space)) == 2
    assert agent.findtext(".//c:ParticipantIndex", namespaces=space) == "none"
    eager, patient = (r.findtext(".//c:HeartbeatInterval", namespaces=space) for r in (root, agent))
    assert (eager, patient) == ("10 ms", "100 ms"), "a thousand agents ask a tenth as often"


def test_a_name_that_does_not_resolve_is_our_error_not_an_abort() -> None:
    with pytest.raises(ConfigError, match="does not resolve"):
        resolve("no-such-host.invalid")


TEXTS = ("", "a", "ab", "abc", "abcd", "ä€", "x" * 5_000)


@pytest.mark.parametrize("text", TEXTS, ids=len)
@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63)])
def test_our_encoding_is_the_wheels_encoding(text: str, number: int) -> None:
    envelope = Envelope(text, "s", number, text, 3, number, 5, "tag", text)
    theirs = Envelope.__idl__.serialize(envelope)
    ours = envelope.serialize()
    assert ours == theirs
    assert Envelope.deserialize(theirs) == envelope
    assert Envelope.__idl__.deserialize(ours) == envelope


def test_other_encodings_are_read_too() -> None:
    envelope = Envelope("k", "s", 1, "p", 2, 3, 4, "tag", "body")
    for version_2 in (False, True):
        for endianness in Endianness:
            data = Envelope.__idl__.serialize(
                envelope, endianness=endianness, use_version_2=version_2
            )
            assert Envelope.deserialize(data) == envelope


def test_a_field_that_a_newer_version_appended_is_left_alone() -> None:
    envelope = Envelope("k", "s", 1, "p", 2, 3, 4, "tag", "body123")
    data = envelope.serialize() + b"\x05\0\0\0more\0"
    assert Envelope.deserialize(data) == envelope


def test_bytes_of_a_stranger_are_an_envelope_that_nobody_signed() -> None:
    whole = Envelope("k", "s", 1, "p", 2, 3, 4, "tag", "body").serialize()
    header = whole[:8]
    for data in (header, whole[:20], header + b"\xff" * 40, header + b"\3\0\0\0\xff\xff\0\0" * 9):
        assert Envelope.deserialize(data).tag == ""


def test_a_message_goes_to_those_concerned() -> None:
    members = ("c1", "c2")
    assert topics.BEACON.written(16, members) == ("",) == topics.BEACON.read("c1", 16)
    status = topics.ATTEMPT_STATUS
    assert status.written(16, members) == (topics.EVERYBODY, "to-c1", "to-c2")
    assert status.read("c2", 16) == (topics.EVERYBODY, status.partition_of("c2", 16))
    assert status.partition_of("", 16) == topics.EVERYBODY
    assert topics.INTENT.read("n1", 16)[0] in topics.INTENT.written(16, members)


def test_names_that_no_resolver_takes_are_a_mistake_in_the_configuration() -> None:
    """An old ledger or cluster file may hold such a name: the idna codec raises no OSError."""
    for name in ("host..example", f"{'a' * 64}.example"):
        with pytest.raises(ConfigError, match="does not resolve"):
            resolve(name)


def test_bytes_that_are_no_envelope_are_an_empty_one_and_so_is_any_key() -> None:
    good = to_wire(Message("t", "k", "s", 1, "p", 3, 4, 5, "{}", "tag")).serialize()
    other = b"\x00\x07\x00\x00"  # another encapsulation, which the wheel reads
    for data in (b"", good[:9], good[:-3], other + good[4:], other + bytes(3), b"\xff" * 40):
        assert isinstance(Envelope.deserialize(data), Envelope)
        assert Envelope.deserialize_key(data).key == ""
