"""The history of a run: what was asked, what was broken, what the ledger said, and when.

One JSON line per event. The checkers judge this file and nothing else, so a run can be judged
again later, and a test can write a history by hand. Times are epoch ms of the harness's clock
(the one clock that no fault touches); `LedgerEntry.at_ms` inside is the leader's own.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeVar

import msgspec

from idl.errors import ConfigError
from idl.jobs import SourceRef
from idl.ledger import LedgerEntry
from idl.records import Outcome

HISTORY_VERSION: Final = 1
Operation = Literal["submit", "cancel", "poison"]
Ack = Literal["ok", "refused", "unknown"]
"""`unknown`: no answer in time, it may have happened (Jepsen's `:info`)."""


class _Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    at_ms: float


class RunStarted(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="run_started"):
    """First event. `processes` are the lanes of the timeline."""

    v: int = HISTORY_VERSION
    scenario: str
    seed: int
    minutes: float
    processes: tuple[str, ...] = ()
    queue_topic: str = ""
    strangers: bool = False
    """The cluster is not ours: others' jobs may be in its ledger."""
    checkers: tuple[str, ...] = ()
    """Those that the scenario names; empty: all of them."""


class Invoked(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="invoked"):
    """The generator asked. `ends`: how this job may end; `result`: what it must have written
    (sha256 of the result bytes in hex), "" where any will do."""

    operation: Operation
    job: str
    kind: str = ""
    ends: tuple[str, ...] = ()
    result: str = ""


class Completed(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="completed"):
    """Kafka answered the generator, or nobody did. `sources`: where the records are."""

    operation: Operation
    job: str
    ack: Ack
    sources: tuple[SourceRef, ...] = ()
    error: str = ""


class FaultBegan(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="fault_began"):
    """A fault took effect on `targets`."""

    fault: int
    kind: str
    targets: tuple[str, ...] = ()
    detail: str = ""
    means: str = ""
    """By what it was done, where a kind can be done in several ways."""
    hit_leader: bool = False


class FaultHealed(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="fault_healed"):
    """Its healing was carried out. What was harmed may still need time to come back.
    `detail`: what was counted while it lasted. `error`: why the healing failed, "" where it did
    not; what was broken may be so to the end of the run."""

    fault: int
    detail: str = ""
    error: str = ""


class FaultSkipped(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="fault_skipped"):
    """A fault of the scenario that cannot be done here, and why."""

    kind: str
    reason: str


class ProcessEnded(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="process_ended"):
    """A process ended that nobody had killed: a crash. `log` is the tail of its log."""

    process: str
    log: str = ""


class EntryRead(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="entry"):
    """The observer read a ledger entry and judged it."""

    offset: int
    valid: bool
    reason: str = ""
    entry: LedgerEntry


class Hashed(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="hashed"):
    """State hash of the reader `by` after every entry below `next_offset`."""

    by: str
    next_offset: int
    state_hash: str


class Audited(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="audited"):
    """What `outrider audit` found in Kafka alone. `exit_code` 0: every invariant holds."""

    exit_code: int
    entries: int = 0
    message: str = ""


class ObserverBroke(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="observer_broke"):
    """The observer could not go on: the ledger contradicts itself or cannot be read."""

    error: str


class ResultFound(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="result"):
    """One record of `results`, read at the end. Times are of the node's clock."""

    source: SourceRef
    job: str = ""
    attempt: int = 0
    node: str = ""
    outcome: Outcome | Literal[""] = ""
    started_ms: int = 0
    ended_ms: int = 0
    sha256: str = ""
    unreadable: str = ""


class Left(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="left"):
    """Something that the run left on the machine."""

    what: str


class Phase(_Event, frozen=True, kw_only=True, omit_defaults=True, tag="phase"):
    """`load` begins, all is `healed`, the jobs have `settled`, the cluster is `stopped`."""

    name: Literal["load", "healed", "settled", "stopped", "interrupted"]
    detail: str = ""


Event = (
    RunStarted | Invoked | Completed | FaultBegan | FaultHealed | FaultSkipped | ProcessEnded
    | EntryRead | Hashed | Audited | ObserverBroke | ResultFound | Left | Phase
)  # fmt: skip
History = tuple[Event, ...]
E = TypeVar("E", bound=_Event)


class Recorder:
    """Appends events to the file and keeps them. Thread-safe."""

    def __init__(self, path: Path, now_ms: Callable[[], float]) -> None:
        self.path = path
        self.now_ms = now_ms
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._encoder = msgspec.json.Encoder()
        self._file: BinaryIO = path.open("wb")

    def add(self, *events: Event) -> None:
        """Records events in this order."""
        lines = b"".join(self._encoder.encode(event) + b"\n" for event in events)
        with self._lock:
            self._events.extend(events)
            if not self._file.closed:
                self._file.write(lines)

    def history(self) -> History:
        """Everything so far."""
        with self._lock:
            return tuple(self._events)

    def close(self) -> None:
        """Flushes the file. Idempotent."""
        with self._lock:
            self._file.close()


def read_history(path: Path) -> Iterator[Event]:
    """The events of a file. Raises ConfigError with the line that cannot be read."""
    decoder = msgspec.json.Decoder(Event)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path} line {number} is not an event: {error}") from error


def of(kind: type[E], history: Iterable[Event]) -> list[E]:
    """The events of one kind, in order."""
    return [event for event in history if isinstance(event, kind)]


def judged_jobs(history: History) -> Callable[[str], bool]:
    """Which jobs are judged one by one: all, or on a cluster that is not ours those of this run.

    Others' jobs were not watched: their results were not read, their ids may have been used twice.
    """
    if not any(run.strangers for run in of(RunStarted, history)):
        return lambda _job: True
    ours = {event.job for event in of(Invoked, history)}
    return lambda job: job in ours
