"""Writing records: one idempotent producer, one poll thread, asyncio or plain callers."""

from concurrent.futures import Future

from idl.jobs import SourceRef
from idl.settings import KafkaSettings

DELIVERY_TIMEOUT_MS = 60_000
"""Results and submissions: outlasts a broker's restart; after it the caller is told."""


class RecordProducer:
    """Thread-safe. Everything else of the data plane that writes is built on one of these."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        name: str = "producer",
        delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
        linger_ms: float = 1.0,
    ) -> None:
        raise NotImplementedError

    async def produce(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | str | None = None,
        content_type: str = "",
        partition: int | None = None,
    ) -> SourceRef:
        """Writes one record; returns its place once it is acknowledged by all in-sync replicas.

        Waits while the local queue is full. Raises PlatformFaultError(retryable=True) when it is
        not delivered in time (it may still have been written), JobFaultError when it is too large.
        """
        raise NotImplementedError

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | str | None = None,
        content_type: str = "",
        partition: int | None = None,
    ) -> "Future[SourceRef]":
        """`produce` for callers without a loop; blocks only while the local queue is full."""
        raise NotImplementedError

    def flush(self, timeout_s: float = 10.0) -> int:
        """Waits for what was sent; returns how many records are still undelivered."""
        raise NotImplementedError

    def close(self, timeout_s: float = 10.0) -> None:
        """Flushes, fails what remains, ends the thread. Idempotent."""

    async def aclose(self, timeout_s: float = 10.0) -> None:
        """`close` without blocking the loop."""
