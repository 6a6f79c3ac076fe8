"""Submitting: a job is one record of `queue.<queue>`."""

from collections.abc import Callable, Iterable

import msgspec

from dataplane.producer import RecordProducer
from idl.ids import JobId, QueueName
from idl.jobs import JobSpec, SourceRef
from idl.limits import PAYLOAD_INLINE_BYTES_MAX
from idl.records import DeadLetter
from idl.settings import KafkaSettings


class Submitted(msgspec.Struct, frozen=True):
    """Acknowledged by Kafka: the job's id, and its submission's place."""

    job: JobId
    source: SourceRef


class Submitter:
    """Checks specs, names jobs, puts large payloads behind claim checks, produces.

    `new_id` and `now_ms` are parameters so that tests are deterministic.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        producer: RecordProducer | None = None,
        inline_max: int = PAYLOAD_INLINE_BYTES_MAX,
        submitter: str = "",
        new_id: Callable[[], str] | None = None,
        now_ms: Callable[[], int] | None = None,
    ) -> None:
        """Without `producer` it opens one of its own and closes it."""
        raise NotImplementedError

    async def submit(self, queue: QueueName, spec: JobSpec) -> Submitted:
        """One job. Raises InvalidRecordError (the spec), PlatformFaultError (retryable)."""
        raise NotImplementedError

    async def submit_many(self, queue: QueueName, specs: Iterable[JobSpec]) -> list[Submitted]:
        """Many jobs, pipelined, in order of `specs`; raises at the first that fails."""
        raise NotImplementedError

    def submit_sync(self, queue: QueueName, spec: JobSpec) -> Submitted:
        """`submit` for callers without a loop."""
        raise NotImplementedError

    def submit_many_sync(self, queue: QueueName, specs: Iterable[JobSpec]) -> list[Submitted]:
        """`submit_many` for callers without a loop."""
        raise NotImplementedError

    async def replay(self, letter: DeadLetter) -> Submitted:
        """Submits a dead letter's job again under a new id. Raises InvalidRecordError where the
        original is gone or was never a valid job."""
        raise NotImplementedError

    def close(self) -> None:
        """Flushes and closes its own producer. Idempotent."""

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
