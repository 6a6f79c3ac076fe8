"""Kafka topics: names, keys, settings. DDS topics are in `idl.dds.types` beside their types."""

from typing import Final, Literal

import msgspec

from idl.ids import PoolName, QueueName
from idl.limits import KAFKA_RECORD_BYTES_MAX
from idl.units import MIB

RETENTION_FOREVER_MS: Final = -1
RETENTION_LOGS_MS: Final = 7 * 86_400_000
"""Output is for people and for a while; results and the ledger are kept."""

SNAPSHOT_SEGMENT_BYTES: Final = 64 * MIB
"""Small, so that old snapshots are compacted away soon (the newest segment never is)."""


class TopicSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a topic is created. `partitions` 0: as many as the cluster settings say for queues.

    `segment_bytes` 0: the broker's default; compaction works on full segments only.
    """

    name: str
    partitions: int = 1
    cleanup: Literal["delete", "compact"] = "delete"
    retention_ms: int = RETENTION_FOREVER_MS
    segment_bytes: int = 0

    def config(self) -> dict[str, str]:
        """Topic configuration as Kafka spells it (cleanup.policy, retention.ms, …)."""
        segment = {"segment.bytes": str(self.segment_bytes)} if self.segment_bytes else {}
        return {
            "cleanup.policy": self.cleanup,
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(KAFKA_RECORD_BYTES_MAX),
            **segment,
        }


class TopicNames(msgspec.Struct, frozen=True):
    """Full topic names under the cluster's prefix (`""` or e.g. `"outrider."`)."""

    prefix: str = ""

    def queue(self, queue: QueueName) -> str:
        """Submissions to `queue`; key = job id."""
        return f"{self.prefix}queue.{queue}"

    def queue_of(self, topic: str) -> QueueName | None:
        """The queue whose topic this is, or None."""
        start = f"{self.prefix}queue."
        return QueueName(topic.removeprefix(start)) if topic.startswith(start) else None

    def ledger(self, pool: PoolName) -> str:
        """Decisions of `pool`: one partition, so that there is one order."""
        return f"{self.prefix}ledger.{pool}"

    @property
    def payloads(self) -> str:
        """Bytes behind claim checks; key = job id."""
        return f"{self.prefix}payloads"

    @property
    def results(self) -> str:
        """One record per attempt; key = job id."""
        return f"{self.prefix}results"

    @property
    def logs(self) -> str:
        """stdout and stderr chunks; key = job id."""
        return f"{self.prefix}logs"

    @property
    def commands(self) -> str:
        """Operators' durable intents: one partition, so that they have one order."""
        return f"{self.prefix}commands"

    @property
    def dead_letter(self) -> str:
        """What ended without a result; key = job id or source of the refused record."""
        return f"{self.prefix}dead-letter"

    @property
    def snapshots(self) -> str:
        """State at a ledger offset; compacted; keys: `idl.snapshots`."""
        return f"{self.prefix}snapshots"

    def table(
        self, pool: PoolName, queues: tuple[QueueName, ...], partitions: int = 1
    ) -> tuple[TopicSettings, ...]:
        """Every topic of a cluster. `partitions` applies to queues, payloads, results and logs."""
        return (
            *(TopicSettings(name=self.queue(name), partitions=partitions) for name in queues),
            TopicSettings(name=self.ledger(pool)),
            TopicSettings(name=self.payloads, partitions=partitions),
            TopicSettings(name=self.results, partitions=partitions),
            TopicSettings(name=self.logs, partitions=partitions, retention_ms=RETENTION_LOGS_MS),
            TopicSettings(name=self.commands),
            TopicSettings(name=self.dead_letter),
            TopicSettings(
                name=self.snapshots, cleanup="compact", segment_bytes=SNAPSHOT_SEGMENT_BYTES
            ),
        )
