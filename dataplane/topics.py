"""Creating the topics of `idl.topics`, and checking those that are there already.

Brokers differ (ADR 0002): Tansu accepts any topic setting and any replication factor without
acting on it, answers a metadata request for an unknown topic by creating it with 4 partitions,
and cannot add partitions. So topics are looked up in the list of all topics, never by name.
"""

import time
from collections.abc import Sequence
from typing import Final

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined] # public, but no __all__ there
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
)

from dataplane.broker.contract import Progress, quiet
from dataplane.kafka import checked, open_admin
from idl.errors import ConfigError, PlatformFaultError
from idl.settings import KafkaSettings
from idl.topics import TopicNames, TopicSettings

EMBEDDED_NOTE: Final = (
    "the embedded broker keeps records in memory only and ignores retention, compaction, "
    "replication and size limits of topics"
)
LEADER_POLL_S: Final = 0.05
_ONE_ORDER: Final = ("ledger.", "commands", "dead-letter", "snapshots")
"""Topics whose one partition is their meaning."""


class TopicsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `ensure_topics` did. `notes`: where the broker differs from what was asked for."""

    created: tuple[str, ...] = ()
    existing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def ensure_topics(
    settings: KafkaSettings,
    table: Sequence[TopicSettings],
    *,
    progress: Progress = quiet,
    timeout_s: float = 30.0,
) -> TopicsReport:
    """Creates what is missing, leaves data alone; idempotent and safe to run from two processes.

    Settings of a topic that is there (retention, cleanup, record size) are brought up to date.
    Raises ConfigError where a one-partition topic (ledger, commands, …) exists with more
    partitions, BrokerUnavailableError, PlatformFaultError (refused by the broker).
    """
    admin = open_admin(settings)
    there = partition_counts(settings, admin, timeout_s)
    missing = [topic for topic in table if topic.name not in there]
    if missing:
        progress(f"creating {len(missing)} topics at {settings.bootstrap}")
        _create(settings, admin, missing, timeout_s)
        there = _wait_for_leaders(settings, admin, {t.name for t in missing}, timeout_s)
    notes = [EMBEDDED_NOTE] if settings.kind == "embedded" else []
    made = {topic.name for topic in missing}
    existing = [topic for topic in table if topic.name not in made]
    for topic in table:
        notes += _check_partitions(settings, topic, there.get(topic.name, topic.partitions))
    notes += _update_settings(settings, admin, existing, timeout_s)
    return TopicsReport(
        created=tuple(topic.name for topic in missing),
        existing=tuple(topic.name for topic in existing),
        notes=tuple(notes),
    )


def partition_counts(
    settings: KafkaSettings, admin: AdminClient | None = None, timeout_s: float = 5.0
) -> dict[str, int]:
    """Every topic of the cluster and its partitions. Raises BrokerUnavailableError."""
    try:
        found = (admin or open_admin(settings)).list_topics(timeout=timeout_s).topics
    except KafkaException as error:
        raise checked(error, "listing topics", settings) from error
    return {name: len(topic.partitions) for name, topic in found.items()}


def _wait_for_leaders(
    settings: KafkaSettings, admin: AdminClient, names: set[str], timeout_s: float
) -> dict[str, int]:
    """Until every partition of the new topics has a leader: a topic is created before it works."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = admin.list_topics(timeout=timeout_s).topics
        except KafkaException as error:
            raise checked(error, "listing topics", settings) from error
        waiting = {
            name
            for name in names
            if name not in found or any(p.leader < 0 for p in found[name].partitions.values())
        }
        if not waiting:
            return {name: len(topic.partitions) for name, topic in found.items()}
        if time.monotonic() > deadline:
            raise PlatformFaultError(
                f"topic {min(waiting)} has no leader after {timeout_s:.0f} s; "
                "look at the health of the Kafka cluster",
                retryable=True,
            )
        time.sleep(LEADER_POLL_S)


def _create(
    settings: KafkaSettings,
    admin: AdminClient,
    missing: Sequence[TopicSettings],
    timeout_s: float,
) -> None:
    wanted = [
        NewTopic(
            topic.name,
            num_partitions=topic.partitions or settings.queue_partitions,
            replication_factor=settings.replication_factor,
            config=topic.config() | settings.topic,
        )
        for topic in missing
    ]
    futures = admin.create_topics(wanted, operation_timeout=timeout_s, request_timeout=timeout_s)
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise checked(error, f"creating topic {name}", settings) from error


def _check_partitions(settings: KafkaSettings, topic: TopicSettings, found: int) -> list[str]:
    wanted = topic.partitions or settings.queue_partitions
    if found == wanted:
        return []
    own = topic.name.removeprefix(TopicNames(settings.prefix).prefix)
    if own.startswith(_ONE_ORDER):
        raise ConfigError(
            f"topic {topic.name} has {found} partitions and must have 1 (its order is its meaning);"
            " choose another kafka.prefix, or delete the topic if nothing in it is needed"
        )
    return [f"topic {topic.name} has {found} partitions, not {wanted}; it is used as it is"]


def _update_settings(
    settings: KafkaSettings, admin: AdminClient, existing: Sequence[TopicSettings], timeout_s: float
) -> list[str]:
    """Sets what differs; a broker that does not let us is a note, not an error."""
    if not existing:
        return []
    by_name = {topic.name: topic.config() | settings.topic for topic in existing}
    asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in by_name]
    notes: list[str] = []
    changes: list[ConfigResource] = []
    for resource, future in admin.describe_configs(asked, request_timeout=timeout_s).items():
        try:
            now = {name: entry.value for name, entry in future.result().items()}
        except KafkaException as error:
            notes.append(f"settings of {resource.name} cannot be read: {error.args[0].str()}")
            continue
        differing = {k: v for k, v in by_name[resource.name].items() if now.get(k) != v}
        if differing:
            changes.append(_change(resource.name, differing))
    if changes:
        altered = admin.incremental_alter_configs(changes, request_timeout=timeout_s)
        for resource, future in altered.items():
            try:
                future.result()
            except KafkaException as error:
                notes.append(f"settings of {resource.name} are kept: {error.args[0].str()}")
    return notes


def _change(name: str, values: dict[str, str]) -> ConfigResource:
    return ConfigResource(
        ConfigResource.Type.TOPIC,
        name,
        incremental_configs=[
            ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
            for key, value in values.items()
        ],
    )
