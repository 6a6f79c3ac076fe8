"""The agent's journal: its records, what they mean, and how they are framed. Pure (ADR 0006).

A record says what is so from now on; folding the records of a journal gives, for every attempt the
node knows, where it was when the agent last wrote. What to do about each after a restart is decided
in `node_agent.core.recovery`.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import msgspec

from idl.control import AssignIntent
from node_agent.sandbox.plan import SandboxOutcome

JOURNAL_VERSION: Final = 1
COMPACT_BYTES_MIN: Final = 1 << 20
"""A smaller journal is never rewritten: reading it takes milliseconds."""
COMPACT_FACTOR: Final = 2
"""It is rewritten when it has grown to this many times what it had after the last rewriting: each
byte is copied about once, and the file is bounded by what is live."""
RECORD_BYTES_MAX: Final = 64 << 20
"""More than a result (RESULT_BYTES_MAX) and a spec can take: a longer length is a torn frame."""

_HEADER: Final = 8
"""Length and CRC-32 of the record, four bytes each, little-endian."""

Key = tuple[str, int]
"""(job, attempt)."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", omit_defaults=True):
    pass


class Opened(_Record, frozen=True, kw_only=True, tag="opened", omit_defaults=True):
    """The first record: whose journal this is. `incarnation` lives as long as the journal.

    `scope` names the cluster, its topics and the pool: attempts of another ledger are not ours.
    """

    v: int = JOURNAL_VERSION
    scope: str
    node: str
    boot_id: str
    incarnation: int


class TermSeen(_Record, frozen=True, kw_only=True, tag="term", omit_defaults=True):
    """The highest term of an accepted intent: older leaders stay fenced after a restart."""

    term: int


class Accepted(_Record, frozen=True, kw_only=True, tag="accepted", omit_defaults=True):
    """An assign was accepted. `lease_until_ms`: of an exclusive attempt, as in `Leased`."""

    assign: AssignIntent
    term: int
    at_ms: int
    lease_until_ms: int = 0


class Leased(_Record, frozen=True, kw_only=True, tag="leased", omit_defaults=True):
    """An exclusive attempt may run until then (CLOCK_BOOTTIME of this boot)."""

    job: str
    attempt: int
    until_ms: int


class Launching(_Record, frozen=True, kw_only=True, tag="launching", omit_defaults=True):
    """The launcher is about to be asked: from here on it may have run."""

    job: str
    attempt: int


class Started(_Record, frozen=True, kw_only=True, tag="started", omit_defaults=True):
    """The job's own program runs."""

    job: str
    attempt: int
    at_ms: int


class Ended(_Record, frozen=True, kw_only=True, tag="ended", omit_defaults=True):
    """Nothing of it is left but its output in the spool; its result is to be delivered."""

    job: str
    attempt: int
    at_ms: int
    outcome: SandboxOutcome
    detail: str = ""


class Delivered(_Record, frozen=True, kw_only=True, tag="delivered", omit_defaults=True):
    """Kafka has its result; the attempt is remembered so that it never runs again."""

    job: str
    attempt: int


class Forgotten(_Record, frozen=True, kw_only=True, tag="forgotten", omit_defaults=True):
    """Its end is in the ledger."""

    job: str
    attempt: int


Record = Opened | TermSeen | Accepted | Leased | Launching | Started | Ended | Delivered | Forgotten


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. `assign` is None once its result was delivered."""

    assign: AssignIntent | None = None
    term: int = 0
    accepted_ms: int = 0
    launching: bool = False
    started_ms: int = 0
    ended: Ended | None = None
    lease_until_ms: int = 0

    @property
    def delivered(self) -> bool:
        """Only remembered."""
        return self.assign is None


_DELIVERED: Final = Entry()
_change = msgspec.structs.replace


class JournalState:
    """What a journal says. Records that contradict it (there are none) change nothing."""

    def __init__(self) -> None:
        self.opened: Opened | None = None
        self.term = 0
        self.entries: dict[Key, Entry] = {}

    def apply(self, record: Record) -> None:
        """Folds one record in."""
        match record:
            case Opened():
                self.opened = record
            case TermSeen(term=term):
                self.term = max(self.term, term)
            case Accepted(assign=assign, term=term, at_ms=at_ms, lease_until_ms=until_ms):
                self.term = max(self.term, term)
                key = (assign.job, assign.attempt)
                entry = Entry(assign=assign, term=term, accepted_ms=at_ms, lease_until_ms=until_ms)
                self.entries.setdefault(key, entry)
            case Delivered(job=job, attempt=attempt):
                self.entries[job, attempt] = _DELIVERED
            case Forgotten(job=job, attempt=attempt):
                self.entries.pop((job, attempt), None)
            case Leased() | Launching() | Started() | Ended():
                self._advance(record)

    def _advance(self, record: Leased | Launching | Started | Ended) -> None:
        key = (record.job, record.attempt)
        entry = self.entries.get(key)
        if entry is None or entry.delivered or entry.ended is not None:
            return
        match record:
            case Leased(until_ms=until_ms):
                entry = _change(entry, lease_until_ms=until_ms)
            case Launching():
                entry = _change(entry, launching=True)
            case Started(at_ms=at_ms):
                entry = _change(entry, launching=True, started_ms=at_ms)
            case Ended():
                entry = _change(entry, ended=record)
        self.entries[key] = entry

    def records(self) -> Iterator[Record]:
        """The shortest journal that says the same."""
        if self.opened is not None:
            yield self.opened
        if self.term:
            yield TermSeen(term=self.term)
        for (job, attempt), entry in self.entries.items():
            if entry.assign is None:  # delivered
                yield Delivered(job=job, attempt=attempt)
                continue
            yield Accepted(
                assign=entry.assign, term=entry.term, at_ms=entry.accepted_ms,
                lease_until_ms=entry.lease_until_ms,
            )  # fmt: skip
            if entry.started_ms:
                yield Started(job=job, attempt=attempt, at_ms=entry.started_ms)
            elif entry.launching:
                yield Launching(job=job, attempt=attempt)
            if entry.ended is not None:
                yield entry.ended


class Read(NamedTuple):
    """A journal's bytes, understood: its whole records, and how many bytes they take.

    A writer that was killed leaves the beginning of one frame, which nothing was done about yet.
    Anything else after the good bytes is damage: what the missing records said is unknown.
    """

    records: tuple[Record, ...]
    good_bytes: int
    damaged: bool


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def frame(record: Record) -> bytes:
    """One record as it is in the file."""
    body = _encoder.encode(record)
    head = len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")
    return head + body


def frames(records: Iterable[Record]) -> bytes:
    """Several."""
    return b"".join(frame(record) for record in records)


def read(data: bytes) -> Read:
    """All whole records up to the first that is torn or damaged."""
    records: list[Record] = []
    at, view = 0, memoryview(data)
    while at < len(data):
        head = view[at : at + _HEADER]
        size = int.from_bytes(head[:4], "little")
        body = view[at + _HEADER : at + _HEADER + size]
        if len(head) == _HEADER and not 0 < size <= RECORD_BYTES_MAX:
            return Read(tuple(records), at, damaged=True)
        if len(head) < _HEADER or len(body) < size:
            break
        if zlib.crc32(body) != int.from_bytes(head[4:], "little"):
            return Read(tuple(records), at, damaged=True)
        try:
            records.append(_decoder.decode(body))
        except msgspec.MsgspecError:  # another version wrote it
            return Read(tuple(records), at, damaged=True)
        at += _HEADER + size
    return Read(tuple(records), at, damaged=False)


def fold(records: Iterable[Record]) -> JournalState:
    """The state after these records."""
    state = JournalState()
    for record in records:
        state.apply(record)
    return state


class Origin(NamedTuple):
    """Whose journal is wanted. `boot_id` changes when the machine starts anew."""

    scope: str
    node: str
    boot_id: str
    now_ns: int


def take_over(found: Read, origin: Origin) -> tuple[JournalState, bool]:
    """The state to go on with, and whether it is the same incarnation.

    A whole journal of this node and this boot is gone on with: what it says runs may really run.
    Otherwise (nothing there, another boot, damage) the attempts are gone or unknown: the node is a
    new incarnation, higher than the one before, and only results that wait for Kafka are kept.
    """
    state = fold(found.records)
    before = state.opened
    ours = (
        before is not None
        and before.v == JOURNAL_VERSION
        and (before.scope, before.node) == (origin.scope, origin.node)
    )
    if before is not None and ours and before.boot_id == origin.boot_id and not found.damaged:
        return state, True
    incarnation = origin.now_ns
    kept: dict[Key, Entry] = {}
    if before is not None and ours:
        incarnation = max(incarnation, before.incarnation + 1)
        kept = {key: entry for key, entry in state.entries.items() if entry.ended is not None}
    fresh = JournalState()
    fresh.opened = Opened(
        scope=origin.scope, node=origin.node, boot_id=origin.boot_id, incarnation=incarnation
    )
    fresh.entries = kept
    return fresh, False
