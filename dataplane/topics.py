"""Creating the topics of `idl.topics`, and checking those that are there already."""

from collections.abc import Sequence

import msgspec

from dataplane.broker.contract import Progress, quiet
from idl.settings import KafkaSettings
from idl.topics import TopicSettings


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

    Raises ConfigError where a one-partition topic (ledger, commands, …) exists with more
    partitions, BrokerUnavailableError, PlatformFaultError (refused by the broker).
    """
    raise NotImplementedError
