"""Which ledger entries count: the one rule that makes a zombie leader harmless.

Election gives liveness; the ledger's order gives safety (DESIGN, idea 2; ADR 0001). Every reader
(leader, standby, CLI, audit) passes each entry through a `TermGate` in offset order and ignores
the void ones. The rule needs neither locks nor clocks:

* an entry *starts a term* when its first decision is `TermStarted`, its `seq` is 1 and its term
  is higher than every term started before it in the log;
* any other entry is valid when it is of the newest term, from the process that started it, and
  its `seq` follows the last valid one.

So late writes of a former leader are void, and so is an append that a producer repeated.
"""

from typing import Final, Literal

import msgspec

from idl.ledger import LedgerEntry, TermStarted

VoidReason = Literal[
    "older_term", "term_not_started", "not_the_leader", "duplicate", "gap", "malformed"
]


class Verdict(msgspec.Struct, frozen=True):
    """Whether an entry counts. `reason` is "" for a valid one; `detail` is for people."""

    valid: bool
    reason: VoidReason | Literal[""] = ""
    detail: str = ""


VALID: Final = Verdict(True)


class TermGate:
    """Judges entries in offset order. Its memory is the newest term, its starter, its last seq."""

    __slots__ = ("incarnation", "leader", "next_offset", "seq", "term")

    def __init__(self) -> None:
        self.term = 0
        """Highest term started so far; 0 before the first."""
        self.leader = ""
        self.incarnation = 0
        self.seq = 0
        """Last valid `seq` of that term."""
        self.next_offset = 0
        """One more than the highest offset judged."""

    def judge(self, offset: int, entry: LedgerEntry) -> Verdict:
        """The verdict on `entry`; a valid one is remembered. Offsets must grow, gaps are Kafka's.

        Raises ValueError where `offset` was judged before: a reader that goes back would count
        decisions twice.
        """
        if offset < self.next_offset:
            raise ValueError(f"ledger offset {offset} was read already; resume at its successor")
        self.next_offset = offset + 1
        verdict = self._verdict(entry)
        if verdict.valid:
            self.term, self.leader = entry.term, entry.leader
            self.incarnation, self.seq = entry.incarnation, entry.seq
        return verdict

    def _verdict(self, entry: LedgerEntry) -> Verdict:
        if entry.term < self.term:
            return Verdict(False, "older_term", f"term {entry.term} ended when {self.term} started")
        starts = bool(entry.decisions) and type(entry.decisions[0]) is TermStarted
        if entry.term > self.term:
            if not starts or entry.seq != 1:
                return Verdict(False, "term_not_started", f"term {entry.term} was never started")
            return self._well_formed(entry)
        if (entry.leader, entry.incarnation) != (self.leader, self.incarnation):
            return Verdict(False, "not_the_leader", f"term {self.term} belongs to {self.leader}")
        if entry.seq <= self.seq:
            return Verdict(False, "duplicate", f"seq {entry.seq} was appended before")
        if entry.seq > self.seq + 1:
            return Verdict(False, "gap", f"seq {entry.seq} follows {self.seq}")
        return self._well_formed(entry)

    @staticmethod
    def _well_formed(entry: LedgerEntry) -> Verdict:
        """`TermStarted` stands first in the first entry of a term and nowhere else."""
        rest = entry.decisions[1:] if entry.seq == 1 else entry.decisions
        if any(type(decision) is TermStarted for decision in rest):
            return Verdict(False, "malformed", "TermStarted is not the first decision of its term")
        return VALID
