"""The ledger as a log: append an entry, read entries back in order (DESIGN, idea 2)."""

import asyncio
from collections.abc import Callable, Iterator

from idl.errors import PlatformFaultError
from idl.ids import PoolName
from idl.ledger import LedgerEntry
from idl.limits import INBOX_RECORDS_MAX
from idl.settings import KafkaSettings

LEDGER_DELIVERY_TIMEOUT_MS = 30_000
"""An append is given up after this: well past a broker's failover (2–9 s), short enough to tell."""


class LedgerWriter:
    """Appends with an idempotent producer of its own (`acks=all`).

    After a failure the entry may or may not be in the ledger: append *the same* entry again, never
    another one under its (term, seq); readers void the duplicate.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        pool: PoolName,
        *,
        delivery_timeout_ms: int = LEDGER_DELIVERY_TIMEOUT_MS,
    ) -> None:
        raise NotImplementedError

    def append(self, entry: LedgerEntry) -> "asyncio.Future[int]":
        """Sends now (order of calls = order in the log); the future gives its offset.

        Call on the running loop. Fails with PlatformFaultError(retryable=True) when not
        acknowledged in time; all later entries not yet acknowledged then fail too.
        """
        raise NotImplementedError

    def append_sync(self, entry: LedgerEntry) -> int:
        """`append` for tools without a loop. Returns the offset."""
        raise NotImplementedError

    @property
    def oldest_pending_ms(self) -> float:
        """How long the oldest unacknowledged append has waited; 0 where there is none."""
        raise NotImplementedError

    def close(self, timeout_s: float = 5.0) -> None:
        """Gives pending appends `timeout_s`, fails the rest. Idempotent."""

    async def aclose(self) -> None:
        """`close` without blocking the loop."""


class LedgerReader:
    """Follows the ledger from an offset; batches of (offset, entry) arrive on `loop`.

    An entry that cannot be decoded stops it: `on_error(LedgerCorruptError)`, after the entries
    before it were handed over. It does not judge validity (`dataplane.core.validity`).
    """

    def __init__(
        self,
        settings: KafkaSettings,
        pool: PoolName,
        start: int,
        on_entries: Callable[[list[tuple[int, LedgerEntry]]], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        on_error: Callable[[PlatformFaultError], None] | None = None,
        on_stall: Callable[[bool, str], None] | None = None,
        unacknowledged_max: int = INBOX_RECORDS_MAX,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Starts reading; returns at once."""

    def done(self, count: int) -> None:
        """`count` entries are dealt with (backpressure, see Tail)."""

    async def end_offset(self, timeout_s: float = 5.0) -> int:
        """Next ledger offset to be written. Raises BrokerUnavailableError."""
        raise NotImplementedError

    @property
    def stalled(self) -> bool:
        """No broker has answered for a while."""
        raise NotImplementedError

    def close(self) -> None:
        """Stops. Idempotent."""

    async def aclose(self) -> None:
        """`close` without blocking the loop."""


def read_ledger(
    settings: KafkaSettings, pool: PoolName, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, LedgerEntry]]:
    """Entries `start` ≤ offset < `end` (default: the end as of the call), void ones included.

    Raises LedgerCorruptError, BrokerUnavailableError.
    """
    raise NotImplementedError
