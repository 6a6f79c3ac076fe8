"""The simulated DDS: messages are delayed, lost, doubled, reordered; links break, also one way.

What the product's envelope guarantees is kept, no more: per sender and stream, what is older than
something seen is dropped (`replayed`), and so is what is too old or too new by the receiver's wall
clock (`not-fresh`). See `idl.envelope.Opener`, of which this is the rule without the signatures.
"""

from collections.abc import Callable
from typing import NamedTuple

from chaos.sim.clock import Wall
from chaos.sim.world import World
from idl.envelope import FRESH_MS

DELAYS_MS = (1, 1, 1, 1, 2, 3, 8)
REORDERED_MS_MAX = 60
"""How far a delayed message may fall behind its successors."""


class Sealed(NamedTuple):
    """A message with what its envelope says."""

    topic: str
    key: str
    sender: str
    incarnation: int
    seq: int
    at_ms: int
    body: object


class Endpoint:
    """One process's side of the network: it seals what it sends and opens what it receives."""

    def __init__(self, network: "Network", name: str, incarnation: int, wall: Wall) -> None:
        self.network, self.name, self.incarnation, self.wall = network, name, incarnation, wall
        self._seq = 0
        self._seen: dict[tuple[str, str, str], tuple[int, int]] = {}

    def seal(self, topic: str, key: str, body: object) -> Sealed:
        """`seq` grows over all messages of this process."""
        self._seq += 1
        return Sealed(
            topic, key, self.name, self.incarnation, self._seq, self.wall.now_ms, body
        )  # fmt: skip

    def refusal(self, message: Sealed) -> str:
        """Why it is not believed; "" where it is, and then it is remembered."""
        stream = (message.topic, message.sender, message.key)
        position = (message.incarnation, message.seq)
        if position <= self._seen.get(stream, (0, 0)):
            return "replayed"
        if abs(self.wall.now_ms - message.at_ms) > FRESH_MS:
            return "not-fresh"
        self._seen[stream] = position
        return ""


class Network:
    """Carries sealed messages to whoever has the receiver's name when they arrive."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._dice = world.dice("network")
        self._handlers: dict[str, Callable[[Sealed], None]] = {}
        self._cuts: dict[int, frozenset[tuple[str, str]]] = {}
        self._cuts_made = 0
        self.loss = self.duplicates = self.slow = self.reorder = 0.0
        """Chances, 0 in calm times."""

    def attach(self, name: str, handler: Callable[[Sealed], None]) -> None:
        """From now on `name` is this process."""
        self._handlers[name] = handler

    def send(self, sender: str, to: str, message: Sealed) -> None:
        """Maybe delivers, maybe later, maybe twice."""
        if any((sender, to) in cut for cut in self._cuts.values()):
            self._world.count("network", "cut")
            return
        dice = self._dice
        if self.loss and dice.random() < self.loss:
            self._world.count("network", "lost")
            return
        copies = 1
        if self.duplicates and dice.random() < self.duplicates:
            self._world.count("network", "doubled")
            copies = 2
        for _ in range(copies):
            self._world.after(self._delay(), lambda: self._handlers[to](message))

    def _delay(self) -> int:
        dice = self._dice
        delay = dice.choice(DELAYS_MS)
        if self.slow and dice.random() < self.slow:
            self._world.count("network", "slowed")
            delay += dice.randint(20, 300)
        if self.reorder and dice.random() < self.reorder:
            delay += dice.randint(1, REORDERED_MS_MAX)
        return delay

    def cut(self, links: list[tuple[str, str]]) -> int:
        """Breaks links (from, to); the number is for `mend`. Cuts may overlap."""
        self._cuts_made += 1
        self._cuts[self._cuts_made] = frozenset(links)
        return self._cuts_made

    def mend(self, cut: int) -> None:
        """Undoes one `cut`."""
        self._cuts.pop(cut, None)

    def calm(self) -> None:
        """Everything arrives again."""
        self._cuts.clear()
        self.loss = self.duplicates = self.slow = self.reorder = 0.0
