"""A bad wire between real network namespaces: what was asked for happens, and everything else gets
through whole."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from chaos.faults import network, wire
from chaos.faults.network import BROKER, Network
from chaos.faults.wire import Weather
from idl.errors import PlatformFaultError

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
PORT = 7_007
DATAGRAMS = 400

ECHO = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", {PORT}))
print("up", flush=True)
while True:
    data, sender = s.recvfrom(2048); s.sendto(data, sender)
"""
ASK = f"""
import json, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((sys.argv[1], {PORT}))
sent, took, copies, heard = {{}}, {{}}, 0, time.monotonic()
def hear(until):
    global copies, heard
    while (left := until - time.monotonic()) > 0:
        s.settimeout(left)
        try: number = s.recv(2048).decode()
        except TimeoutError: return
        copies, heard = copies + 1, time.monotonic()
        took.setdefault(number, time.monotonic() - sent[number])
for n in range({DATAGRAMS}):
    sent[str(n)] = time.monotonic(); s.send(str(n).encode()); hear(time.monotonic() + 0.003)
while time.monotonic() - heard < 2: hear(time.monotonic() + 0.5)
rtt_ms_min = 1000 * min(took.values())
print(json.dumps({{"answered": len(took), "copies": copies, "rtt_ms_min": rtt_ms_min}}))
"""
SINK = f"""
import hashlib, socket
s = socket.create_server(("0.0.0.0", {PORT})); print("up", flush=True)
peer, _ = s.accept(); found = hashlib.sha256()
while data := peer.recv(65536): found.update(data)
peer.sendall(found.hexdigest().encode()); peer.close()
"""
POUR = f"""
import random, socket, sys
s = socket.create_connection((sys.argv[1], {PORT}), timeout=30)
s.sendall(random.Random(7).randbytes(4_000_000)); s.shutdown(socket.SHUT_WR)
print(s.recv(64).decode())
"""


class Asked(msgspec.Struct):
    answered: int
    copies: int
    rtt_ms_min: float


class Two:
    """Namespaces of `c1` and of the broker."""

    def __init__(self, net: Network) -> None:
        self.net = net

    def python(self, name: str, program: str, *arguments: str) -> "subprocess.Popen[str]":
        argv = [*self.net.enter(name), sys.executable, "-c", program, *arguments]
        return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE)

    def ask(self, server: str, client: str) -> str:
        """The server at the broker, the client at c1."""
        serving = self.python(BROKER, server)
        try:
            assert serving.stdout is not None and serving.stdout.readline() == "up\n"
            asking = self.python("c1", client, self.net.address(BROKER))
            out, _ = asking.communicate(timeout=60)
            assert asking.returncode == 0
            return out
        finally:
            serving.kill()
            serving.communicate()

    def datagrams(self) -> Asked:
        return msgspec.json.decode(self.ask(ECHO, ASK), type=Asked)


@pytest.fixture
def two() -> Iterator[Two]:
    reason = network.unavailable() or wire.unavailable()
    if reason:
        pytest.skip(reason)
    net = Network(["c1"], [])
    try:
        net.up()
        yield Two(net)
    finally:
        net.down()
    left = network.ip("link", "show")
    assert net.prefix not in left
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if _is_wire_of(p, net.prefix)]


def _is_wire_of(path: Path, prefix: str) -> bool:
    try:
        words = path.read_bytes()
    except OSError:
        return False
    return b"chaos.faults.wire" in words and prefix.encode() in words


def test_a_share_of_frames_is_lost(two: Two) -> None:
    two.net.splice("c1", Weather(loss=0.2, seed=1))
    asked = two.datagrams()
    counts = two.net.unsplice("c1")
    lost = DATAGRAMS - asked.answered
    assert 0.1 < lost / DATAGRAMS < 0.3 and asked.copies == asked.answered
    assert lost <= counts.lost, "ARP may be lost as well"
    assert counts.sent >= DATAGRAMS and counts.received >= asked.answered
    assert two.datagrams().answered == DATAGRAMS, "and then the kernel carries again"


def test_a_share_of_frames_comes_twice(two: Two) -> None:
    two.net.splice("c1", Weather(duplication=0.3, seed=1))
    asked = two.datagrams()
    counts = two.net.unsplice("c1")
    assert asked.answered == DATAGRAMS
    assert 0.2 < (asked.copies - DATAGRAMS) / DATAGRAMS < 0.4
    assert counts.doubled >= asked.copies - DATAGRAMS and not counts.lost


def test_frames_are_late(two: Two) -> None:
    assert two.datagrams().rtt_ms_min < 60
    two.net.splice("c1", Weather(delay_ms=80, jitter_ms=20, seed=1))
    asked = two.datagrams()
    counts = two.net.unsplice("c1")
    assert asked.answered == DATAGRAMS == asked.copies
    assert asked.rtt_ms_min >= 60
    assert counts.delayed == counts.sent >= DATAGRAMS


def test_what_was_left_to_the_hardware_arrives_whole(two: Two) -> None:
    """TCP on a veth pair sends segments of up to 64 KiB, with checksums that nobody has made."""
    two.net.splice("c1", Weather(loss=0.01, duplication=0.01, seed=1))
    digest = two.ask(SINK, POUR).strip()
    counts = two.net.unsplice("c1")
    assert digest == hashlib.sha256(random.Random(7).randbytes(4_000_000)).hexdigest()
    assert counts.lost and counts.doubled and not counts.overflown
    assert counts.sent < 4_000_000 / 1_448, "they were not cut before they came to the wire"


def test_a_wire_that_cannot_begin_says_why(two: Two) -> None:
    made = wire.Wire("no-such-interface", "nor-this", Weather())
    with pytest.raises(PlatformFaultError, match="No such device"):
        made.begin()
