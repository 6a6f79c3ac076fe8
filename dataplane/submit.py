"""Submitting: a job is one record of `queue.<queue>`, acknowledged by all in-sync replicas."""

import asyncio
import hashlib
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Final

import msgspec

from dataplane.core.claimcheck import (
    Stored,
    large_inputs,
    needs_claim_check,
    reference,
    with_references,
)
from dataplane.payloads import put_payload
from dataplane.producer import RecordProducer
from idl.codec import MSGPACK, decode_spec, encode
from idl.errors import InvalidRecordError
from idl.ids import JobId, QueueName
from idl.jobs import JobSpec, PayloadRef, SourceRef, validate_spec
from idl.limits import PAYLOAD_INLINE_BYTES_MAX
from idl.records import DeadLetter
from idl.settings import KafkaSettings
from idl.topics import TopicNames

PIPELINE_RECORDS_MAX: Final = 2_000
"""Jobs of one bulk call sent and not yet acknowledged: fills the wire, bounds memory."""
YIELD_EVERY: Final = 64
"""A bulk call lets the loop breathe after this many jobs (about a millisecond)."""


class Submitted(msgspec.Struct, frozen=True):
    """Acknowledged by Kafka: the job's id, and its submission's place."""

    job: JobId
    source: SourceRef


def _random_id() -> str:
    return uuid.uuid4().hex


def _epoch_ms() -> int:
    return time.time_ns() // 1_000_000


class Submitter:
    """Checks specs, names jobs, puts large payloads behind claim checks, produces.

    `new_id` and `now_ms` are parameters so that tests are deterministic. A submission that failed
    as retryable may have been written: submit it again with the id it had (set `spec.id`), and the
    leader drops the duplicate.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        producer: RecordProducer | None = None,
        inline_max: int = PAYLOAD_INLINE_BYTES_MAX,
        submitter: str = "",
        new_id: Callable[[], str] = _random_id,
        now_ms: Callable[[], int] = _epoch_ms,
    ) -> None:
        """Without `producer` it opens one of its own and closes it."""
        self._topics = TopicNames(settings.prefix)
        self._own = producer is None
        self._producer = producer or RecordProducer(settings, name="submit", linger_ms=2.0)
        self._inline_max = inline_max
        self._submitter = submitter
        self._new_id = new_id
        self._now_ms = now_ms

    async def submit(self, queue: QueueName, spec: JobSpec) -> Submitted:
        """One job. Raises InvalidRecordError (the spec), ConfigError (no such queue),
        PlatformFaultError (retryable)."""
        return (await self.submit_many(queue, (spec,)))[0]

    async def submit_many(self, queue: QueueName, specs: Iterable[JobSpec]) -> list[Submitted]:
        """Many jobs, pipelined, in order of `specs`; raises at the first that fails.

        What was sent before the failure stays submitted; give specs ids of your own to be able
        to submit all of them again.
        """
        return [submitted async for submitted in self._pipeline(queue, specs)]

    async def _pipeline(
        self, queue: QueueName, specs: Iterable[JobSpec]
    ) -> AsyncIterator[Submitted]:
        topic = self._topics.queue(queue)
        sent: deque[tuple[JobId, asyncio.Future[SourceRef]]] = deque()
        stored: Stored = {}
        for spec in specs:
            named = self._named(spec)
            data = encode(await self._checked_in(named, stored))
            place = await self._producer.enqueue(topic, data, key=named.id, content_type=MSGPACK)
            sent.append((JobId(named.id), place))
            if len(sent) % YIELD_EVERY == 0:
                await asyncio.sleep(0)
            if len(sent) >= PIPELINE_RECORDS_MAX:
                job, acknowledged = sent.popleft()
                yield Submitted(job, await acknowledged)
        for job, acknowledged in sent:
            yield Submitted(job, await acknowledged)

    async def _checked_in(self, spec: JobSpec, stored: Stored) -> JobSpec:
        """The spec with what is too large to be inline behind claim checks.

        `stored`: what this bulk call has put there; jobs that share an input send it once.
        """
        for data in large_inputs(spec):
            digest = hashlib.sha256(data).digest()
            if digest not in stored:
                topic = self._topics.payloads
                stored[digest] = await put_payload(self._producer, topic, spec.id, data)
        spec = with_references(spec, stored)
        if spec.payload is None or not needs_claim_check(len(spec.payload), self._inline_max):
            return spec
        ref = await put_payload(self._producer, self._topics.payloads, spec.id, spec.payload)
        return msgspec.structs.replace(spec, payload=None, payload_ref=ref)

    def submit_sync(self, queue: QueueName, spec: JobSpec) -> Submitted:
        """`submit` for callers without a loop."""
        return self.submit_many_sync(queue, (spec,))[0]

    def submit_many_sync(self, queue: QueueName, specs: Iterable[JobSpec]) -> list[Submitted]:
        """`submit_many` for callers without a loop."""
        return list(self._pipeline_sync(queue, specs))

    def _pipeline_sync(self, queue: QueueName, specs: Iterable[JobSpec]) -> Iterator[Submitted]:
        topic = self._topics.queue(queue)
        sent: deque[tuple[JobId, Future[SourceRef]]] = deque()
        stored: Stored = {}
        for spec in specs:
            named = self._named(spec)
            data = encode(self._checked_in_sync(named, stored))
            future = self._producer.send(topic, data, key=named.id, content_type=MSGPACK)
            sent.append((JobId(named.id), future))
            if len(sent) >= PIPELINE_RECORDS_MAX:
                job, acknowledged = sent.popleft()
                yield Submitted(job, acknowledged.result())
        for job, acknowledged in sent:
            yield Submitted(job, acknowledged.result())

    def _checked_in_sync(self, spec: JobSpec, stored: Stored) -> JobSpec:
        for large in large_inputs(spec):
            digest = hashlib.sha256(large).digest()
            if digest not in stored:
                stored[digest] = self._put_sync(spec.id, large)
        spec = with_references(spec, stored)
        data = spec.payload
        if data is None or not needs_claim_check(len(data), self._inline_max):
            return spec
        ref = self._put_sync(spec.id, data)
        return msgspec.structs.replace(spec, payload=None, payload_ref=ref)

    def _put_sync(self, job: str, data: bytes) -> PayloadRef:
        place = self._producer.send(self._topics.payloads, data, key=job).result()
        return reference(data, place.partition, place.offset)

    async def replay(self, letter: DeadLetter) -> Submitted:
        """Submits a dead letter's job again under a new id, to the queue it came from.

        Raises InvalidRecordError where the original is gone or was never a valid job.
        """
        spec = self._again(letter)
        return await self.submit(QueueName(letter.queue), spec)

    def replay_sync(self, letter: DeadLetter) -> Submitted:
        """`replay` for callers without a loop."""
        return self.submit_sync(QueueName(letter.queue), self._again(letter))

    def close(self) -> None:
        """Flushes and closes its own producer. Idempotent."""
        if self._own:
            self._producer.close()

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
        await asyncio.to_thread(self.close)

    def _named(self, spec: JobSpec) -> JobSpec:
        named = msgspec.structs.replace(
            spec,
            id=spec.id or self._new_id(),
            submitted_ms=spec.submitted_ms or self._now_ms(),
            submitter=spec.submitter or self._submitter,
        )
        validate_spec(named)
        if named.payload is not None:
            needs_claim_check(len(named.payload), self._inline_max)  # raises if it is too large
        return named

    def _again(self, letter: DeadLetter) -> JobSpec:
        if letter.original is None:
            raise InvalidRecordError(
                "empty",
                f"the original of {letter.key} is not in its dead letter and cannot be replayed; "
                "submit the job again",
            )
        spec = decode_spec(letter.original, letter.content_type)
        return msgspec.structs.replace(spec, id="", submitted_ms=0)
