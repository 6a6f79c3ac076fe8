"""Reading topics by explicit offsets: `Tail` for processes, `read_range` and `scan` for tools."""

import asyncio
from collections.abc import Callable, Iterator, Mapping

import msgspec

from idl.errors import PlatformFaultError
from idl.limits import INBOX_RECORDS_MAX
from idl.settings import KafkaSettings

BEGINNING = -2
END = -1
"""Positions that Kafka resolves: the first record that is kept; the next one to be written."""


class KafkaRecord(msgspec.Struct, frozen=True):
    """One record as read. `timestamp_ms`: broker or producer time, epoch ms (0: none)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    content_type: str = ""
    timestamp_ms: int = 0


class Tail:
    """Follows assigned partitions (never a consumer group) on one thread of its own.

    Batches arrive on `loop` (or on the tail's own thread where loop is None) through `on_records`.
    At most `unacknowledged_max` records are handed over and not yet acknowledged by `done(n)`;
    beyond it the tail stops reading and Kafka keeps the rest.
    All methods are safe from any thread. `on_error` gets what ends the tail (offset out of range,
    topic gone, not authorised): it reads nothing more. `on_stall(True, why)` says that no broker
    has answered for `STALL_MS`, `on_stall(False, "")` that one answers again.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        start: Mapping[tuple[str, int], int],
        on_records: Callable[[list[KafkaRecord]], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        on_error: Callable[[PlatformFaultError], None] | None = None,
        on_stall: Callable[[bool, str], None] | None = None,
        unacknowledged_max: int = INBOX_RECORDS_MAX,
        name: str = "tail",
    ) -> None:
        """`start`: (topic, partition) → first offset wanted, or BEGINNING or END."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts the thread; returns at once."""

    def done(self, count: int) -> None:
        """`count` records that were handed over are dealt with."""

    def pause(self, topic: str) -> None:
        """Stops reading `topic`. Batches handed over before this took effect still arrive."""

    def resume(self, topic: str) -> None:
        """Goes on where `pause` stopped; nothing is skipped or repeated."""

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Goes on at `offset`; batches on the way may still carry older positions."""

    async def end_offsets(self, timeout_s: float = 5.0) -> dict[tuple[str, int], int]:
        """Next offset to be written, per partition. Raises BrokerUnavailableError."""
        raise NotImplementedError

    @property
    def stalled(self) -> bool:
        """No broker has answered for STALL_MS."""
        raise NotImplementedError

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread and the connection; no callback is scheduled after it. Idempotent."""

    async def aclose(self) -> None:
        """`close` without blocking the loop."""


def watermarks(settings: KafkaSettings, topic: str) -> dict[int, tuple[int, int]]:
    """Partition → (first kept offset, next offset to be written). Raises BrokerUnavailableError."""
    raise NotImplementedError


def read_range(
    settings: KafkaSettings,
    topic: str,
    partition: int,
    start: int = BEGINNING,
    end: int | None = None,
    *,
    timeout_s: float = 10.0,
) -> Iterator[KafkaRecord]:
    """Records `start` ≤ offset < `end` (default: the end as of the call), then stops.

    Raises BrokerUnavailableError when nothing comes for `timeout_s`.
    """
    raise NotImplementedError


def scan(
    settings: KafkaSettings, topic: str, *, since_ms: int = 0, timeout_s: float = 10.0
) -> Iterator[KafkaRecord]:
    """Every record of every partition as of the call, partition by partition.

    `since_ms`: start at the first record with this timestamp or a later one (epoch ms).
    """
    raise NotImplementedError
