"""Brokers for tests: each kind starts once per session; every test has a topic prefix of its own.

`broker_settings` runs a test on both kinds. Apache Kafka is skipped, with its reason, where java
or mvn is missing; its jars are kept in the cache of `dataplane.broker.cache` between sessions.
"""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dataplane.broker import Broker, open_broker
from dataplane.broker.apache import fetch_jars, find_java
from dataplane.topics import ensure_topics
from idl.errors import PlatformFaultError
from idl.ids import PoolName, QueueName
from idl.settings import KafkaSettings
from idl.topics import TopicNames

POOL = PoolName("main")
QUEUE = QueueName("default")


def _running(spec: str, directory: Path) -> Iterator[Broker]:
    broker = open_broker(spec, directory)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running embedded broker, shared by the session."""
    yield from _running("embedded", tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def apache_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A running one-node Apache Kafka, shared by the session."""
    require_apache()
    yield from _running("apache", tmp_path_factory.mktemp("apache"))


def require_apache() -> None:
    """Skips where Apache Kafka cannot run here."""
    try:
        find_java()
        fetch_jars(lambda _line: None)
    except PlatformFaultError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.apache)])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Both kinds in turn."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


def fresh_settings(broker: Broker, partitions: int = 2) -> KafkaSettings:
    """Settings with a prefix that no other test has."""
    return KafkaSettings(
        bootstrap=broker.bootstrap,
        kind=broker.kind,
        prefix=f"t{uuid.uuid4().hex[:8]}.",
        queue_partitions=partitions,
    )


def create_topics(settings: KafkaSettings) -> KafkaSettings:
    """All topics of a cluster with pool `main` and queue `default`."""
    names = TopicNames(settings.prefix)
    ensure_topics(settings, names.table(POOL, (QUEUE,), settings.queue_partitions))
    return settings


@pytest.fixture
def broker_settings(broker: Broker) -> KafkaSettings:
    """Both kinds in turn, with fresh topics (2 partitions for queues, payloads, results, logs)."""
    return create_topics(fresh_settings(broker))


@pytest.fixture
def embedded_settings(embedded_broker: Broker) -> KafkaSettings:
    """The embedded broker, with fresh topics."""
    return create_topics(fresh_settings(embedded_broker))


@pytest.fixture
def make_settings(broker: Broker) -> Callable[[], KafkaSettings]:
    """Makes settings without topics, for tests that create their own."""
    return lambda: fresh_settings(broker)
