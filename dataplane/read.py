"""Reading a topic once, from here to there: for the CLI, audits and replays (see `tail` for
processes that follow)."""

import time
from collections.abc import Callable, Iterator
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from dataplane.kafka import checked, consumer_config, unavailable
from dataplane.records import BEGINNING, KafkaRecord, record_of
from dataplane.topics import partition_counts
from idl.errors import ConfigError, PlatformFaultError
from idl.settings import KafkaSettings

POLL_S: Final = 0.1
END_POLL_S: Final = 0.005
END_ROUNDS: Final = 3
"""Rounds with records after which a partition that never rests counts as read to its end."""
BATCH_RECORDS_MAX: Final = 1_000
"""Taken from librdkafka at once; it has read them ahead already."""
READ_TIMEOUT_S: Final = 10.0
"""Nothing comes for this long: the broker is considered gone."""

GONE_CODES: Final = frozenset(
    {
        KafkaError._AUTO_OFFSET_RESET,
        KafkaError.OFFSET_OUT_OF_RANGE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)
"""The records asked for do not exist (any more)."""
DAMAGED_CODES: Final = frozenset(
    {
        KafkaError._BAD_MSG,  # of `check.crcs`, too
        KafkaError._BAD_COMPRESSION,
        KafkaError._NOT_IMPLEMENTED,  # a format of records that this client does not know
        KafkaError.INVALID_MSG,
    }
)
"""The record that comes next cannot be read. librdkafka would ask for it for ever, or skip it."""
LEADERLESS_CODES: Final = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)
"""A broker that has not heard yet of a new topic or leader says one of these for a while."""
REFUSED_CODES: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
        KafkaError._FATAL,
    }
)


def open_consumer(settings: KafkaSettings, name: str, **extra: object) -> Consumer:
    """Raises ConfigError where the client library refuses the settings."""
    try:
        return Consumer(consumer_config(settings, name, **extra))
    except (KafkaException, ValueError, TypeError) as error:
        raise checked(error, "Kafka settings", settings) from error


def reading_fault(
    error: KafkaError, settings: KafkaSettings, where: str
) -> PlatformFaultError | None:
    """What ends a reader, as our error; None for what librdkafka retries by itself."""
    if error.code() in GONE_CODES:
        return PlatformFaultError(
            f"{where} does not exist at {settings.bootstrap} ({error.str()}); records were "
            "deleted there, or this is another cluster than before"
        )
    if error.code() in DAMAGED_CODES:
        return PlatformFaultError(
            f"{where} holds a record that cannot be read ({error.str()}); nothing behind it is "
            "read before it is whole again: restore the partition from a replica or a backup"
        )
    if error.code() in REFUSED_CODES or error.fatal():
        return checked(KafkaException(error), f"reading {where}", settings)
    return None


def partition_watermarks(
    consumer: Consumer,
    settings: KafkaSettings,
    topic: str,
    partition: int,
    timeout_s: float,
    *,
    exact: bool = True,
) -> tuple[int, int]:
    """(first kept offset, next offset to be written). Raises PlatformFaultError, retryable where
    the broker does not know the partition: it may just have been started.

    Not `exact`: short of the last batch on the embedded broker, and without reading that batch.

    Asks again while the partition has no leader that knows itself to be one (just created, or
    moving), for at most `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    # The two ends are two questions, and librdkafka gives a partition that had no first record the
    # end as its beginning: with records written in between, that is no beginning. A partition of
    # which all was deleted answers the same twice.
    doubtful = True
    while True:
        try:
            found = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=timeout_s, cached=False
            )
            if doubtful and found is not None and found[0] == found[1] > 0:
                doubtful = False
                continue
            break
        except KafkaException as error:
            code = error.args[0].code()
            if code in LEADERLESS_CODES and time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            if code in LEADERLESS_CODES:
                raise PlatformFaultError(
                    f"{settings.bootstrap} does not know {topic}[{partition}] "
                    f"({error.args[0].str()}); it may be starting, else see `outrider topics`",
                    retryable=True,
                ) from error
            raise checked(error, f"asking for the end of {topic}[{partition}]", settings) from error
    if found is None:
        raise unavailable(settings, f"no answer for {topic}[{partition}]")
    low, high = found
    if exact and settings.kind == "embedded" and high > low:
        return low, _end_by_reading(settings, topic, partition, high - 1, timeout_s)
    return low, high


def _end_by_reading(
    settings: KafkaSettings, topic: str, partition: int, last_batch: int, timeout_s: float
) -> int:
    """Tansu counts the last batch as one record when it says where a partition ends (ADR 0002),
    so that batch is read. A consumer of its own: the caller's may be assigned elsewhere.

    A partition that is written all the time never shows its end (each fetch finds something), so a
    second round that left nothing unread is enough: librdkafka hands a fetched batch over whole,
    and what was written meanwhile only makes the end a later, equally true one.
    """
    consumer = open_consumer(settings, "end", **{"enable.partition.eof": True})
    end, rounds, deadline = last_batch, 0, time.monotonic() + timeout_s
    try:
        consumer.assign([TopicPartition(topic, partition, last_batch)])
        while time.monotonic() < deadline:
            found = consumer.consume(BATCH_RECORDS_MAX, timeout=END_POLL_S)
            rounds += any(message.error() is None for message in found)
            for message in found:
                error = message.error()
                if error is None:
                    end = (message.offset() or 0) + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    return end
                elif fault := reading_fault(error, settings, f"{topic}[{partition}]"):
                    raise fault
            if rounds >= END_ROUNDS and len(found) < BATCH_RECORDS_MAX:
                return end
    finally:
        consumer.close()
    raise unavailable(settings, f"no end of {topic}[{partition}] found in {timeout_s:.0f} s")


def require_partitions(settings: KafkaSettings, topic: str, timeout_s: float) -> int:
    """How many partitions `topic` has. Raises ConfigError where there is no such topic."""
    count = partition_counts(settings, timeout_s=timeout_s).get(topic, 0)
    if count == 0:
        raise ConfigError(
            f"topic {topic} does not exist at {settings.bootstrap}; run `outrider topics`, "
            "or check the name"
        )
    return count


def watermarks(
    settings: KafkaSettings, topic: str, timeout_s: float = 5.0
) -> dict[int, tuple[int, int]]:
    """Partition → (first kept offset, next offset to be written).

    Raises ConfigError (no such topic), BrokerUnavailableError.
    """
    count = require_partitions(settings, topic, timeout_s)
    consumer = open_consumer(settings, "watermarks")
    try:
        return {
            partition: partition_watermarks(consumer, settings, topic, partition, timeout_s)
            for partition in range(count)
        }
    finally:
        consumer.close()


def read_range(
    settings: KafkaSettings,
    topic: str,
    partition: int,
    start: int = BEGINNING,
    end: int | None = None,
    *,
    timeout_s: float = READ_TIMEOUT_S,
    stop: Callable[[], bool] | None = None,
) -> Iterator[KafkaRecord]:
    """Records `start` ≤ offset < `end` (default: the end as of the call), then stops.

    With `stop` and no `end` it follows the partition until `stop()` is true.
    Raises ConfigError (no such topic), PlatformFaultError (`start` is not in the partition),
    BrokerUnavailableError when nothing comes for `timeout_s`.
    """
    if partition >= require_partitions(settings, topic, timeout_s):
        raise ConfigError(f"topic {topic} has no partition {partition}")
    consumer = open_consumer(settings, "reader", **{"enable.partition.eof": True})
    try:
        low, high = partition_watermarks(consumer, settings, topic, partition, timeout_s)
        first = low if start == BEGINNING else start
        if not low <= first <= high:
            raise PlatformFaultError(
                f"{topic}[{partition}] holds offsets {low} to {high - 1}, not {first}"
            )
        last = end if end is not None else (None if stop else high)
        if last is not None and first >= min(last, high):
            return
        consumer.assign([TopicPartition(topic, partition, first)])
        yield from _read(consumer, settings, (last, high), timeout_s, stop)
    finally:
        consumer.close()


def _read(
    consumer: Consumer,
    settings: KafkaSettings,
    ends: tuple[int | None, int],
    timeout_s: float,
    stop: Callable[[], bool] | None,
) -> Iterator[KafkaRecord]:
    end, high = ends
    last = None if end is None else min(end, high)
    heard = time.monotonic()
    while stop is None or not stop():
        first = consumer.poll(POLL_S)
        if first is None:
            if last is not None and time.monotonic() - heard > timeout_s:
                raise unavailable(settings, f"nothing came for {timeout_s:.0f} s")
            continue
        heard = time.monotonic()
        for message in (first, *consumer.consume(BATCH_RECORDS_MAX, timeout=0)):
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF and last is not None:
                    return  # also where the last offsets are compacted away
                fault = reading_fault(error, settings, f"{message.topic()}[{message.partition()}]")
                if fault is not None:
                    raise fault
                continue
            record = record_of(message)
            if last is not None and record.offset >= last:
                return
            yield record
            if last is not None and record.offset == last - 1:
                return


def read_one(
    settings: KafkaSettings,
    topic: str,
    partition: int,
    offset: int,
    timeout_s: float = READ_TIMEOUT_S,
) -> KafkaRecord | None:
    """The record at exactly this place; None where there is none. Raises PlatformFaultError."""
    low, high = watermarks(settings, topic, timeout_s).get(partition, (0, 0))
    if not low <= offset < high:
        return None
    found = read_range(settings, topic, partition, offset, offset + 1, timeout_s=timeout_s)
    record = next(found, None)
    return record if record is not None and record.offset == offset else None


def scan(
    settings: KafkaSettings,
    topic: str,
    *,
    since_ms: int = 0,
    until_ms: int | None = None,
    timeout_s: float = READ_TIMEOUT_S,
) -> Iterator[KafkaRecord]:
    """Every record of every partition as of the call, partition by partition.

    `since_ms` ≤ timestamp < `until_ms` (epoch ms). Filtered here as well as looked up: Tansu
    answers every lookup by time with offset 0.
    """
    consumer = open_consumer(settings, "scan")
    try:
        starts = _starts(consumer, settings, topic, since_ms, timeout_s)
    finally:
        consumer.close()
    for partition, (start, end) in sorted(starts.items()):
        for record in read_range(settings, topic, partition, start, end, timeout_s=timeout_s):
            if record.timestamp_ms >= since_ms and (
                until_ms is None or record.timestamp_ms < until_ms
            ):
                yield record


def _starts(
    consumer: Consumer, settings: KafkaSettings, topic: str, since_ms: int, timeout_s: float
) -> dict[int, tuple[int, int]]:
    ends = watermarks(settings, topic, timeout_s)
    if since_ms <= 0:
        return ends
    asked = [TopicPartition(topic, partition, since_ms) for partition in ends]
    try:
        found = consumer.offsets_for_times(asked, timeout=timeout_s)
    except KafkaException as error:
        raise checked(error, f"looking up a time in {topic}", settings) from error
    return {
        tp.partition: (
            max(tp.offset, ends[tp.partition][0]) if tp.offset >= 0 else ends[tp.partition][1],
            ends[tp.partition][1],
        )
        for tp in found
    }
