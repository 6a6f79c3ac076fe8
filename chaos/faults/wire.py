"""A wire that is bad on purpose, for kernels without sch_netem: a small process that carries every
frame between two interfaces, and delays, loses or doubles those of one direction.

Frames are taken and given by packet(7) sockets. PACKET_VNET_HDR keeps with each frame what its
sender left to the hardware (a checksum still to be made, segments still to be cut), so that the
kernel that gets it goes on from there: veth pairs offload both.

`carry` is the process (`python -m chaos.faults.wire`), `Wire` what starts and ends it. It begins
when told to, so that nobody waits for an interpreter to start, and ends when its standard input
does, so that it never outlives the harness; then it says what it counted.
"""

import argparse
import heapq
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Final

import msgspec

from idl.errors import PlatformFaultError

ETH_P_ALL: Final = 3
SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
PACKET_IGNORE_OUTGOING: Final = 23
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
VNET_HDR_BYTES: Final = 10
"""struct virtio_net_hdr, in front of every frame."""
FRAME_BYTES_MAX: Final = 256 * 1024
"""Beyond any segment that the kernel leaves to be cut (gso_max_size of veth is 64 KiB)."""
BUFFER_BYTES: Final = 8 * 1024 * 1024
"""Of each socket: what comes while the process is off the CPU on a crowded machine."""
HELD_MAX: Final = 10_000
"""Frames under way at once; what comes beyond is lost, and counted (tc-netem(8) has 1,000)."""
BATCH: Final = 64
"""Frames taken from one side before the other has its turn."""
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0
READY: Final = "ready"
CARRYING: Final = "carrying"
NICENESS: Final = -10
"""It stands for a cable: it should not wait for the processes that it joins."""


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to frames that the member sends. Shares are from 0 to 1."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    """A frame is late by `delay_ms` ± this, even odds: later ones may overtake it."""
    loss: float = 0.0
    duplication: float = 0.0
    seed: int = 0


class Counts(msgspec.Struct):
    """Frames of the member, and those to it, which are only carried."""

    sent: int = 0
    lost: int = 0
    doubled: int = 0
    delayed: int = 0
    overflown: int = 0
    """Lost for HELD_MAX, or because the kernel would not take them."""
    received: int = 0

    def __str__(self) -> str:
        return (
            f"{self.sent} frames sent, {self.lost} lost, {self.doubled} doubled, "
            f"{self.delayed} delayed, {self.overflown} overflown; {self.received} received"
        )


class Fate:
    """Decides over frames by seeded dice. Pure but for its own state."""

    def __init__(self, weather: Weather) -> None:
        self.weather, self.counts = weather, Counts()
        self._dice = random.Random(f"wire/{weather.seed}")

    def of_next(self) -> list[float]:
        """After how many ms each copy of the next frame goes on; [] where it is lost."""
        weather, dice, counts = self.weather, self._dice, self.counts
        counts.sent += 1
        if dice.random() < weather.loss:
            counts.lost += 1
            return []
        copies = 1
        if dice.random() < weather.duplication:
            counts.doubled += 1
            copies = 2
        if not weather.delay_ms:
            return [0.0] * copies
        counts.delayed += 1
        spread = weather.jitter_ms
        return [weather.delay_ms + dice.uniform(-spread, spread) for _ in range(copies)]


def packet_socket(interface: str) -> socket.socket:
    """Every frame that arrives at an interface, and none that leaves it. Raises OSError."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    made.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
    if interface:
        made.bind((interface, ETH_P_ALL))
    made.setblocking(False)
    return made


def unavailable() -> str:
    """Why there can be no wire of ours; "" where there can."""
    try:
        packet_socket("").close()
    except OSError as error:
        return f"a wire of our own needs packet(7) sockets ({error.strerror})"
    return ""


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def carry(member: str, rest: str, weather: Weather, *, until: int) -> Counts:
    """Carries frames between the interfaces until the descriptor `until` is readable."""
    fate = Fate(weather)
    counts, numbers = fate.counts, count()
    held: list[tuple[float, int, bytes]] = []
    ours, theirs = packet_socket(member), packet_socket(rest)

    def give(to: socket.socket, frame: bytes) -> None:
        try:
            to.send(frame)
        except OSError:  # its queue is full or its interface is going: as lost as on a real wire
            counts.overflown += 1

    def from_member(frame: bytes) -> None:
        now = time.monotonic()
        for late_ms in fate.of_next():
            if not late_ms:
                give(theirs, frame)
            elif len(held) < HELD_MAX:
                heapq.heappush(held, (now + late_ms / 1000, next(numbers), frame))
            else:
                counts.overflown += 1

    def to_member(frame: bytes) -> None:
        counts.received += 1
        give(ours, frame)

    with ours, theirs:
        _tell(CARRYING)
        while True:
            wait = max(0.0, held[0][0] - time.monotonic()) if held else None
            ready, _, _ = select.select([ours.fileno(), theirs.fileno(), until], [], [], wait)
            if until in ready:
                return counts
            _drain(ours, from_member)
            _drain(theirs, to_member)
            while held and held[0][0] <= time.monotonic():
                give(theirs, heapq.heappop(held)[2])


def _drain(source: socket.socket, take: Callable[[bytes], None]) -> None:
    for _ in range(BATCH):
        try:
            frame = source.recv(FRAME_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:  # ENETDOWN: the interface is going; whoever removes it ends us as well
            return
        if len(frame) > VNET_HDR_BYTES:
            take(frame)


class Wire:
    """A running wire between two interfaces of this network namespace."""

    def __init__(self, member: str, rest: str, weather: Weather) -> None:
        """Returns when it is ready to carry. Raises PlatformFaultError."""
        self._name = member
        words = msgspec.json.encode(weather).decode()
        argv = [sys.executable, "-m", "chaos.faults.wire", member, rest, words]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is the harness's to handle; it ends us
        )  # fmt: skip
        self._expect(READY)

    def begin(self) -> None:
        """From now on it carries. Raises PlatformFaultError."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then it has not said that it carries, and why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        self._expect(CARRYING)

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
        if not ready or self._process.stdout.readline().strip() != word:
            self._process.kill()
            _, said = self._process.communicate()
            last = said.strip().rpartition("\n")[2] or f"not {word} after {START_TIMEOUT_S:g} s"
            raise PlatformFaultError(f"the wire of {self._name} did not start: {last}")

    def close(self) -> Counts:
        """Ends it, with what is still under way; what it counted. Raises PlatformFaultError."""
        try:
            told, said = self._process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            told, said = self._process.communicate()
        if self._process.returncode != 0:
            raise PlatformFaultError(f"a wire ended by itself: {said.strip()[-300:]}")
        return msgspec.json.decode(told, type=Counts)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="chaos.faults.wire", description=__doc__)
    parser.add_argument("member", help="interface towards the member")
    parser.add_argument("rest", help="interface towards everybody else")
    parser.add_argument("weather", help="as JSON")
    options = parser.parse_args(argv)
    weather = msgspec.json.decode(options.weather, type=Weather)
    with suppress(PermissionError):
        os.nice(NICENESS)
    _tell(READY)
    if not os.read(sys.stdin.fileno(), 1):
        return 0  # ended before it began
    counts = carry(options.member, options.rest, weather, until=sys.stdin.fileno())
    _tell(msgspec.json.encode(counts).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
