"""Who reaches the ledger's partition: so that a leader that alone is cut off from Kafka gives way.

A Kafka that stalls stalls all alike, and then nobody resigns (it would be a circle). A leader that
is cut off alone is another matter. Both look the same from inside, so those who see the leader say
that Kafka stalls ask the partition's broker themselves (a question that writes nothing), and say in
their renewals whether it answered. The leader asks the same question: an append that fails where
the question is answered (too few replicas, say) fails for everybody, and is no reason either.
"""

from collections.abc import Sequence
from typing import Final

PROBE_EVERY_MS: Final = 500
"""Between two questions, while there is doubt; without doubt nothing is asked."""
FRESH_MS: Final = 3_500
"""How long an answer of our own counts: a question may wait two seconds for its answer."""
SAID_FRESH_MS: Final = 1_000
"""How long what another said counts; it says it again at every heartbeat."""
CUT_MS: Final = 2_000
"""How long enough others must reach it while we do not. After a broker's failover clients find it
again within a second and a half of each other (metadata refresh, backoff, a question on its way):
that must not move the lead."""
HOLD_MS: Final = 10_000
"""A new leader does not hand over for Kafka before this: if all were cut off in turns, the lead
would otherwise run in a circle as fast as that can be noticed."""


class Reach:
    """One process's view: its own answers, and what others said to it."""

    def __init__(self) -> None:
        self._own: tuple[bool, int] | None = None
        self._asking = False
        self._ask_at_ms = 0
        self._others: dict[str, tuple[bool, int]] = {}
        self._cut_since_ms: int | None = None

    # --- the question -------------------------------------------------------------------------

    def ask(self, now_ms: int) -> bool:
        """True where the partition's broker is to be asked now; then `answered` follows."""
        if self._asking or now_ms < self._ask_at_ms:
            return False
        self._asking, self._ask_at_ms = True, now_ms + PROBE_EVERY_MS
        return True

    def next_ask_ms(self, now_ms: int) -> int:
        """When to ask again, if there is doubt."""
        return now_ms + PROBE_EVERY_MS if self._asking else self._ask_at_ms

    def answered(self, reached: bool, now_ms: int) -> None:
        """The broker answered, or did not in time."""
        self._asking, self._own = False, (reached, now_ms)

    def own(self, now_ms: int) -> bool | None:
        """Whether this process reaches it; None where nobody asked lately."""
        if self._own is None or now_ms - self._own[1] > FRESH_MS:
            return None
        return self._own[0]

    @property
    def doubtful(self) -> bool:
        """The last answer was none: ask until there is one."""
        return self._own is not None and not self._own[0]

    # --- what others say ----------------------------------------------------------------------

    def said(self, voter: str, reaches: bool | None, now_ms: int) -> None:
        """`voter` told us; None: it has not asked."""
        if reaches is None:
            self._others.pop(voter, None)
        else:
            self._others[voter] = (reaches, now_ms)

    def lead(self) -> None:
        """A lead begins: what was said to an earlier one does not count."""
        self._others.clear()
        self._cut_since_ms = None

    def successor(self, order: Sequence[str], enough: int, now_ms: int) -> str:
        """Who shall lead instead of us, of the members in their `order` (us among them): the first
        that reaches it. "" unless `enough` (or all others) do, and have for CUT_MS, and we not."""
        reaching = [
            name
            for name in order
            if self._others.get(name, (False, 0))[0]
            and now_ms - self._others[name][1] <= SAID_FRESH_MS
        ]
        if self.own(now_ms) is not False or len(reaching) < max(1, min(enough, len(order) - 1)):
            self._cut_since_ms = None
            return ""
        if self._cut_since_ms is None:
            self._cut_since_ms = now_ms
        return reaching[0] if now_ms - self._cut_since_ms >= CUT_MS else ""
