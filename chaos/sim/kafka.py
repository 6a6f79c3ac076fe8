"""The simulated Kafka: partitions as lists, and appends that fail, come late, or land twice.

A record that is in the log stays there, in one order for every reader: that is what `acks=all` and
two in-sync replicas give, and all that the design asks for (ADR 0001).
"""

from collections.abc import Callable

from chaos.sim.world import World
from idl.codec import encode
from idl.jobs import SourceRef
from idl.ledger import LedgerEntry

TIMEOUT_MS = 40
"""After this an append that is late or lost is reported as failed."""
LATE_MS_MAX = 2_500


class Kafka:
    """`append` is the ledger; `produce` is every other topic."""

    def __init__(
        self, world: World, landed: Callable[[int, bytes], None], news: Callable[[], None]
    ) -> None:
        self._world = world
        self._dice = world.dice("kafka")
        self._landed, self._news = landed, news
        self.ledger: list[bytes] = []
        self.records: dict[tuple[str, int], list[object]] = {}
        self.available = True
        self.slow = self.fails = self.late = self.twice = 0.0
        """Chances, 0 in calm times."""

    def append(
        self, entry: LedgerEntry, failed: Callable[[], None], *, reached: bool = True
    ) -> None:
        """To the ledger. `failed` is called where the producer gives up; it may land all the
        same, before or after. Not `reached`: the appending process is cut off from it."""
        dice, value = self._dice, encode(entry)
        if self.available and not reached:
            self._world.count("log", "append_cut_off")
            if dice.random() < 0.3:  # it waits in the producer until the cut heals
                self._world.after(dice.randint(500, 2 * LATE_MS_MAX), lambda: self._land(value))
            self._world.after(TIMEOUT_MS, failed)
            return
        if not self.available:
            self._world.count("log", "append_refused")
            self._world.after(TIMEOUT_MS, failed)
            return
        delay = dice.randint(1, 5)
        if dice.random() < self.slow:
            self._world.count("log", "append_slow")
            delay += dice.randint(50, 600)
        if dice.random() < self.twice:
            self._world.count("log", "append_twice")
            self._world.after(delay + dice.randint(0, 80), lambda: self._land(value))
        if dice.random() < self.late:
            self._world.count("log", "append_late")
            self._world.after(dice.randint(TIMEOUT_MS + 1, LATE_MS_MAX), lambda: self._land(value))
            self._world.after(TIMEOUT_MS, failed)
        elif dice.random() < self.fails:
            landed = dice.random() < 0.5
            self._world.count("log", "append_unacknowledged" if landed else "append_lost")
            if landed:
                self._world.after(delay, lambda: self._land(value))
            self._world.after(TIMEOUT_MS, failed)
        else:
            self._world.after(delay, lambda: self._land(value))

    def _land(self, value: bytes) -> None:
        self.ledger.append(value)
        self._world.story.absorb(self._world.now, value)
        self._landed(len(self.ledger) - 1, value)
        self._news()

    def next_source(self, topic: str, partition: int) -> SourceRef:
        """Where the next record of this partition will lie."""
        records = self.records.setdefault((topic, partition), [])
        return SourceRef(topic=topic, partition=partition, offset=len(records))

    def produce(self, source: SourceRef, record: object) -> None:
        """Appends to the partition for which `source` was taken just before."""
        records = self.records[(source.topic, source.partition)]
        assert source.offset == len(records), "next_source and produce belong together"
        records.append(record)
        self._news()

    def calm(self) -> None:
        """Everything works again."""
        self.available = True
        self.slow = self.fails = self.late = self.twice = 0.0
