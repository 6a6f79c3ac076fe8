"""Kafka client configuration from `idl.settings.KafkaSettings`, in one place, and how we ask
whether a broker is there.

librdkafka's own log lines go to the Python logger `outrider.kafka`, never to a terminal.
What a person sets in `KafkaSettings.client` wins over everything here.
"""

import logging
from typing import Any, Final

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from idl.errors import BrokerUnavailableError, ConfigError, PlatformFaultError
from idl.limits import KAFKA_RECORD_BYTES_MAX
from idl.settings import KafkaSettings
from idl.units import KIB, MIB

LOG_REPEAT_S: Final = 10.0
"""While a broker is away librdkafka says so a hundred times a second; one line of a kind is told
per this time, with how many were not."""


class _OneOfAKind(logging.Filter):
    """Lets one record per kind (client and event) through in LOG_REPEAT_S."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """`record.args` of librdkafka: event, client; the rest is the text itself."""
        kind = " ".join(record.getMessage().split()[:2])
        at, hidden = self._told.get(kind, (-LOG_REPEAT_S, 0))
        if record.created - at < LOG_REPEAT_S:
            self._told[kind] = (at, hidden + 1)
            return False
        self._told[kind] = (record.created, 0)
        if hidden:
            record.msg, record.args = f"{record.getMessage()} ({hidden} more like it)", ()
        return True


log = logging.getLogger("outrider.kafka")
log.addHandler(logging.NullHandler())
log.addFilter(_OneOfAKind())

FETCH_WAIT_MS: Final = {"embedded": 5, "apache": 500, "existing": 500}
"""`fetch.wait.max.ms`: Tansu sleeps half of it before it looks again; Apache wakes the fetch."""
METADATA_REFRESH_MS: Final = 1_000
"""Finds a new partition leader within a second, and proves each second that a broker lives."""
RECONNECT_BACKOFF_MS: Final = 20
RECONNECT_BACKOFF_MS_MAX: Final = 200
RETRY_BACKOFF_MS: Final = 20
RETRY_BACKOFF_MS_MAX: Final = 200
"""A failover is noticed in milliseconds; defaults (100 ms … 10 s) would add seconds to it."""
SOCKET_TIMEOUT_MS: Final = 10_000
"""A hung broker's requests are given up after this; the default of 60 s hides it too long."""
CONNECT_TIMEOUT_MS: Final = 3_000
RECEIVE_BYTES_MAX: Final = 512 * MIB
"""Above any fetch answer: Tansu may answer past `fetch.max.bytes`, and librdkafka refuses then."""
FETCH_PARTITION_BYTES: Final = 1 * MIB
"""Asked for per partition and fetch; one larger record still comes whole (KIP-74)."""
PREFETCH_RECORDS_MIN: Final = 10_000
PREFETCH_KIB_MAX: Final = 16 * MIB // KIB
"""Read ahead by librdkafka, per consumer: memory stays bounded whatever the backlog."""
FETCH_QUEUE_BACKOFF_MS: Final = 5
"""How soon librdkafka reads on once its read-ahead is used up; the default stalls for 1 s."""
STATISTICS_MS: Final = 1_000
"""How often librdkafka says how its connections are; see BrokerWatch."""
STALL_MS: Final = 3_000
"""No byte from any broker for this long, with metadata asked for each second: it stalls."""
PRODUCER_QUEUE_KIB_MAX: Final = 64 * MIB // KIB
PRODUCER_QUEUE_RECORDS_MAX: Final = 50_000
"""Not yet acknowledged, per producer; then `produce` waits."""
PRODUCE_IN_FLIGHT_MAX: Final = 1
"""Requests per broker. With more, a producer's *first* record for a partition can be lost and
reported as written: the broker refuses it (the partition has no leader yet), accepts the next one,
which waited behind it, as the first of an unknown producer, and librdkafka takes that as
acknowledgement of both. Fuller batches make up for what is not pipelined (docs/benchmarks.md)."""
GROUP_ID: Final = "outrider-no-group"
"""librdkafka wants one; we assign partitions ourselves and never join or commit."""

Config = dict[str, Any]


def client_config(settings: KafkaSettings, name: str) -> Config:
    """What every client has. `name` is its `client.id` in broker logs."""
    return {
        "bootstrap.servers": settings.bootstrap,
        "client.id": f"outrider-{name}",
        "topic.metadata.refresh.interval.ms": METADATA_REFRESH_MS,
        "reconnect.backoff.ms": RECONNECT_BACKOFF_MS,
        "reconnect.backoff.max.ms": RECONNECT_BACKOFF_MS_MAX,
        "retry.backoff.ms": RETRY_BACKOFF_MS,
        "retry.backoff.max.ms": RETRY_BACKOFF_MS_MAX,
        "socket.timeout.ms": SOCKET_TIMEOUT_MS,
        "socket.connection.setup.timeout.ms": CONNECT_TIMEOUT_MS,
        "socket.keepalive.enable": True,
        "socket.nagle.disable": True,
        "receive.message.max.bytes": RECEIVE_BYTES_MAX,
        "log.connection.close": False,
        "logger": log,
    }


def producer_config(
    settings: KafkaSettings, name: str, *, delivery_timeout_ms: int, linger_ms: float
) -> Config:
    """An idempotent producer, `acks=all`; keys go to the partition that Java clients choose."""
    return {
        **client_config(settings, name),
        "acks": "all",
        "enable.idempotence": True,
        "max.in.flight.requests.per.connection": PRODUCE_IN_FLIGHT_MAX,
        "linger.ms": linger_ms,
        "message.timeout.ms": delivery_timeout_ms,
        "request.timeout.ms": SOCKET_TIMEOUT_MS,
        "message.max.bytes": KAFKA_RECORD_BYTES_MAX,
        "queue.buffering.max.kbytes": PRODUCER_QUEUE_KIB_MAX,
        "queue.buffering.max.messages": PRODUCER_QUEUE_RECORDS_MAX,
        "partitioner": "murmur2_random",
        **settings.client,
    }


def consumer_config(settings: KafkaSettings, name: str, **extra: object) -> Config:
    """A consumer of assigned partitions: no group, no commits, no silent jump to another offset."""
    return {
        **client_config(settings, name),
        "group.id": GROUP_ID,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "allow.auto.create.topics": False,
        "check.crcs": True,  # brokers send what their disks hold, unseen
        "fetch.wait.max.ms": FETCH_WAIT_MS[settings.kind],
        "fetch.error.backoff.ms": RETRY_BACKOFF_MS_MAX,
        "fetch.queue.backoff.ms": FETCH_QUEUE_BACKOFF_MS,
        "max.partition.fetch.bytes": FETCH_PARTITION_BYTES,
        "queued.min.messages": PREFETCH_RECORDS_MIN,
        "queued.max.messages.kbytes": PREFETCH_KIB_MAX,
        **extra,
        **settings.client,
    }


def admin_config(settings: KafkaSettings) -> Config:
    """For creating topics and asking for metadata."""
    return {**client_config(settings, "admin"), **settings.client}


def checked(exception: Exception, doing: str, settings: KafkaSettings) -> PlatformFaultError:
    """A client library's refusal of its configuration, or its failure, as one of our errors."""
    error = exception.args[0] if exception.args else exception
    if not isinstance(error, KafkaError):
        return ConfigError(f"{doing}: {error}; check the Kafka settings of the cluster file")
    if error.code() in _UNREACHABLE:
        return unavailable(settings, error.str())
    if error.code() in _REFUSED:
        return PlatformFaultError(
            f"{doing}: the broker refused ({error.str()}); check credentials and ACLs"
        )
    if error.code() == KafkaError._INVALID_ARG:
        return ConfigError(f"{doing}: {error.str()}; check the Kafka settings of the cluster file")
    return PlatformFaultError(f"{doing}: {error.str()}", retryable=error.retriable())


_UNREACHABLE: Final = {
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
    KafkaError._RESOLVE,
    KafkaError._WAIT_COORD,
    KafkaError._DESTROY_BROKER,  # it left the metadata while it was asked, as a restart makes it
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.REPLICA_NOT_AVAILABLE,
}
_REFUSED: Final = {
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError._SSL,
}


def unavailable(settings: KafkaSettings, why: str = "") -> BrokerUnavailableError:
    """The one line for a broker that does not answer."""
    because = f" ({why})" if why else ""
    return BrokerUnavailableError(
        f"no Kafka broker answers at {settings.bootstrap}{because}; "
        "start one with `outrider up`, or set kafka.bootstrap to one that runs"
    )


def open_admin(settings: KafkaSettings) -> AdminClient:
    """Raises ConfigError where the client library refuses the settings."""
    try:
        return AdminClient(admin_config(settings))
    except (KafkaException, ValueError, TypeError) as error:
        raise checked(error, "Kafka settings", settings) from error


def check_reachable(settings: KafkaSettings, timeout_s: float = 5.0) -> int:
    """How many brokers the cluster has. Raises BrokerUnavailableError (one line that says what
    to do), ConfigError (settings the client library refuses)."""
    admin = open_admin(settings)
    try:
        return len(admin.list_topics(timeout=timeout_s).brokers)
    except KafkaException as error:
        raise checked(error, "asking for brokers", settings) from error


class _BrokerStats(msgspec.Struct):
    nodeid: int
    state: str
    rxidle: int = -1


class _PartitionStats(msgspec.Struct):
    leader: int = -1


class _TopicStats(msgspec.Struct):
    partitions: dict[str, _PartitionStats] = {}


class _Stats(msgspec.Struct):
    brokers: dict[str, _BrokerStats] = {}
    topics: dict[str, _TopicStats] = {}


_stats_decoder = msgspec.json.Decoder(_Stats)


class BrokerWatch:
    """Says from librdkafka's statistics whether the brokers that matter answer.

    Statistics, not `error_cb`: an error tells when a connection broke, nothing tells when an idle
    client is well again. Fields: librdkafka STATISTICS.md (`state`, `rxidle` in µs, `leader`).
    """

    def __init__(self) -> None:
        self.why = ""
        """Why it stalls; empty while it does not."""

    def look(self, statistics: str, partitions: set[tuple[str, int]]) -> bool:
        """True where `why` changed. `partitions`: those whose leaders must be connected."""
        before = self.why
        self.why = self._judge(_stats_decoder.decode(statistics), partitions)
        return bool(before) != bool(self.why)

    @staticmethod
    def _judge(stats: _Stats, partitions: set[tuple[str, int]]) -> str:
        up = {b.nodeid: b for b in stats.brokers.values() if b.state == "UP"}
        if not up:
            return "no broker is connected"
        if min(b.rxidle for b in up.values()) > STALL_MS * 1000:
            return f"no broker has answered for {STALL_MS} ms"
        for topic, partition in sorted(partitions):
            known = stats.topics.get(topic, _TopicStats()).partitions.get(str(partition))
            if known is not None and known.leader not in up:
                return f"the leader of {topic}[{partition}] is not connected"
        return ""
