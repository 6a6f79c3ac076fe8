"""A leader by hand: tests append the decisions they want, to a real ledger."""

import asyncio
from collections.abc import Sequence
from typing import get_args

from dataplane.core.claimcheck import location_of
from dataplane.ledger import LedgerWriter
from dataplane.producer import RecordProducer
from dataplane.read import scan
from dataplane.results import write_result
from idl.codec import decode_spec
from idl.ids import JobId, PoolName, QueueName
from idl.jobs import LimitName, SourceRef, without_payload
from idl.ledger import (
    Assigned,
    Capacity,
    Decision,
    Finished,
    Ingested,
    LedgerEntry,
    NodeSeen,
    Released,
    Started,
    TermStarted,
)
from idl.records import AttemptResult, Outcome, Usage
from idl.settings import ClusterSettings, KafkaSettings
from idl.topics import TopicNames
from idl.units import GIB

POOL = PoolName("main")
QUEUE = QueueName("default")
START_MS = 1_760_000_000_000
EVERYTHING: tuple[LimitName, ...] = get_args(LimitName)


class FakeLeader:
    """Appends as coordinator `name` in `term`. Time is a counter: one second per entry."""

    def __init__(self, kafka: KafkaSettings, name: str = "c1", term: int = 1) -> None:
        self.kafka = kafka
        self.names = TopicNames(kafka.prefix)
        self.name, self.term = name, term
        self._writer = LedgerWriter(kafka, POOL)
        self._producer = RecordProducer(kafka, name="fake-agent")
        self._seq = 0
        self._taken: set[SourceRef] = set()

    def append(self, *decisions: Decision) -> int:
        """One entry; returns its offset."""
        self._seq += 1
        return self._writer.append_sync(
            LedgerEntry(
                term=self.term, leader=self.name, incarnation=self.term, seq=self._seq,
                at_ms=START_MS + 1000 * self._seq, decisions=decisions,
            )
        )  # fmt: skip

    def lead(self, why: str = "test") -> None:
        self.append(TermStarted(pool=POOL, previous_term=self.term - 1, why=why))

    def see_node(self, node: str = "n1", enforces: Sequence[LimitName] = EVERYTHING) -> None:
        capacity = Capacity(cpu_millis=4000, memory_bytes=4 * GIB)
        self.append(
            NodeSeen(node=node, incarnation=1, capacity=capacity, enforces=tuple(enforces),
                     labels={"zone": "a"})
        )  # fmt: skip

    def ingest(self) -> list[JobId]:
        """Takes in every submission not taken in yet, in the order of its partition."""
        found = []
        for record in scan(self.kafka, self.names.queue(QUEUE)):
            if record.source in self._taken:
                continue
            self._taken.add(record.source)
            spec = decode_spec(record.value, record.content_type)
            job = JobId(spec.id)
            payload = location_of(spec, record.source, self.names.payloads)
            self.append(
                Ingested(queue=QUEUE, source=record.source, job=without_payload(spec, job),
                         payload=payload)
            )  # fmt: skip
            found.append(job)
        return found

    def start(self, job: str, attempt: int = 1, node: str = "n1") -> None:
        self.append(Assigned(job=job, attempt=attempt, node=node, incarnation=1))
        self.append(Started(job=job, attempt=attempt))

    def report(
        self, job: str, attempt: int = 1, outcome: Outcome = "succeeded", exit_code: int = 0,
        result: bytes | None = None, stdout: bytes = b"", log: SourceRef | None = None,
    ) -> Released:  # fmt: skip
        """The agent's result record, and the `Released` that names it (not appended yet)."""
        record = AttemptResult(
            job=job, attempt=attempt, node="n1", term=self.term, outcome=outcome,
            exit_code=exit_code, usage=Usage(wall_ms=12, cpu_ms=3), result=result,
            stdout_tail=stdout, stdout_bytes=len(stdout), log=log,
        )  # fmt: skip
        source = asyncio.run(write_result(self._producer, self.kafka, record))
        return Released(
            job=job, attempt=attempt, outcome=outcome, exit_code=exit_code, source=source
        )

    def finish(
        self, job: str, attempt: int = 1, result: bytes | None = None, stdout: bytes = b"",
        log: SourceRef | None = None,
    ) -> None:  # fmt: skip
        """The attempt succeeds and so does the job."""
        released = self.report(job, attempt, result=result, stdout=stdout, log=log)
        self.append(released, Finished(job=job, attempt=attempt))

    def close(self) -> None:
        self._writer.close()
        self._producer.close()


def cluster_settings(kafka: KafkaSettings) -> ClusterSettings:
    """A cluster file around a test's topics."""
    return ClusterSettings(kafka=kafka)
