"""Payloads by claim check: put one into `payloads`, fetch one by its place."""

from dataplane.producer import RecordProducer
from idl.jobs import PayloadLocation, PayloadRef
from idl.settings import KafkaSettings


async def put_payload(producer: RecordProducer, topic: str, key: str, data: bytes) -> PayloadRef:
    """Stores `data` as one record. Raises InvalidRecordError (too large), PlatformFaultError."""
    raise NotImplementedError


class PayloadFetcher:
    """Fetches payloads by partition and offset; many callers at once. Safe from any thread."""

    def __init__(self, settings: KafkaSettings, *, cache_bytes_max: int = 32 * 2**20) -> None:
        raise NotImplementedError

    async def fetch(self, location: PayloadLocation, timeout_s: float = 30.0) -> bytes:
        """The payload, checked against size and SHA-256.

        Raises PayloadMissingError and PayloadCorruptError (JobFaultError: from
        `dataplane.core.claimcheck`), BrokerUnavailableError (retryable).
        """
        raise NotImplementedError

    def fetch_sync(self, location: PayloadLocation, timeout_s: float = 30.0) -> bytes:
        """`fetch` for tools without a loop."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the fetch threads. Idempotent."""

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
