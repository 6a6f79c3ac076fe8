"""Time, dice and the story of one simulated life.

Nothing here or beside it may depend on the wall clock, hash randomisation, or the order of a set:
one seed is one history, byte for byte, on any machine (`Story.digest`).
"""

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

START_MS = 1_000_000_000
"""Where simulated epoch time begins: far enough from 0 for clocks that jump back."""


class Violation(AssertionError):  # noqa: N818 - the field's word for a broken invariant
    """An invariant was broken. `name` is stable; `about` names the jobs, terms and processes."""

    def __init__(self, name: str, message: str, *about: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.about = about


class Line(NamedTuple):
    """One line of the story. `about`: jobs, terms (`t3`), processes that it concerns."""

    at_ms: int
    about: tuple[str, ...]
    text: str


class Story:
    """What happened, in order: a digest always, lines where they are wanted."""

    def __init__(self, *, keep: bool) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._keep = keep
        self.lines: list[Line] = []

    def note(self, at_ms: int, text: str, *about: str) -> None:
        """One line."""
        self._digest.update(f"{at_ms} {text}\n".encode())
        if self._keep:
            self.lines.append(Line(at_ms, about, text))

    def absorb(self, at_ms: int, value: bytes) -> None:
        """Bytes that belong to the history and to no reader's eyes."""
        self._digest.update(at_ms.to_bytes(8, "big") + value)

    @property
    def digest(self) -> str:
        """Equal for equal histories."""
        return self._digest.hexdigest()


class World:
    """`after` plans, `run_until` lets time pass. Every stream of dice has a name of its own, so
    that taking one fault away changes as little else as possible."""

    def __init__(self, seed: int, *, keep_story: bool = False) -> None:
        self.seed = seed
        self.now = START_MS
        self.story = Story(keep=keep_story)
        self.counts: Counter[str] = Counter()
        """What happened how often: the coverage table."""
        self.steps = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._planned = 0

    def dice(self, name: str) -> random.Random:
        """Random numbers of their own for `name`; seeded by text, so hash seeds play no part."""
        return random.Random(f"outrider/{self.seed}/{name}")

    def after(self, delay_ms: int, what: Callable[[], None]) -> None:
        """Plans `what`; of one millisecond, in the order of planning."""
        self._planned += 1
        heapq.heappush(self._events, (self.now + max(delay_ms, 0), self._planned, what))

    def run_until(self, until_ms: int, done: Callable[[], bool] | None = None) -> bool:
        """Lets time pass; True where `done` (looked at now and then) came true before."""
        while self._events and self._events[0][0] <= until_ms:
            self.now, _, what = heapq.heappop(self._events)
            self.steps += 1
            what()
            if done is not None and self.steps % 64 == 0 and done():
                return True
        self.now = until_ms
        return done is not None and done()

    def note(self, text: str, *about: str) -> None:
        """A line of the story, now."""
        self.story.note(self.now, text, *about)

    def count(self, kind: str, what: str) -> None:
        """One more for the coverage table."""
        self.counts[f"{kind}:{what}"] += 1
