"""A record counts as written only where Kafka said where: the refusal of a producer's first one.

The broker is librdkafka's own mock cluster, reached by ctypes in the library that confluent-kafka
brings: it can be told to refuse the next request. (The suite's brokers do so by chance only.)
"""

import asyncio
import ctypes
from collections.abc import Iterator
from typing import Final

import pytest
from confluent_kafka import KafkaError, cimpl

from dataplane.producer import RecordProducer
from dataplane.read import read_range
from idl.errors import PlatformFaultError
from idl.settings import KafkaSettings

TOPIC: Final = "queue.default"
PRODUCE_REQUEST: Final = 0
ANSWER_MS: Final = 200
"""The refusal takes long enough for a second request to be on its way."""


class MockCluster:
    """One mock broker (librdkafka's rdkafka_mock.h) that has TOPIC with one partition."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(cimpl.__file__)
        for name in ("conf_new", "new", "mock_cluster_new", "mock_cluster_bootstraps"):
            self._function(name).restype = ctypes.c_void_p
        error = ctypes.create_string_buffer(512)
        self._client = ctypes.c_void_p(
            self._function("new")(
                0, ctypes.c_void_p(self._function("conf_new")()), error, ctypes.c_size_t(512)
            )
        )
        self._cluster = ctypes.c_void_p(self._function("mock_cluster_new")(self._client, 1))
        self._function("mock_topic_create")(self._cluster, TOPIC.encode(), 1, 1)
        found = self._function("mock_cluster_bootstraps")(self._cluster)
        self.bootstrap = ctypes.string_at(found).decode()

    def _function(self, name: str) -> "ctypes._NamedFuncPointer":
        found: ctypes._NamedFuncPointer = getattr(self._lib, f"rd_kafka_{name}")
        return found

    def refuse_next_produce(self) -> None:
        self._function("mock_broker_push_request_error_rtts")(
            self._cluster,
            1,
            ctypes.c_int16(PRODUCE_REQUEST),
            ctypes.c_size_t(1),
            ctypes.c_int(KafkaError.NOT_LEADER_FOR_PARTITION),
            ctypes.c_int(ANSWER_MS),
        )

    def close(self) -> None:
        self._function("mock_cluster_destroy")(self._cluster)
        self._function("destroy")(self._client)


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    made = MockCluster()
    made.refuse_next_produce()
    yield made
    made.close()


async def _send(settings: KafkaSettings) -> list[int | BaseException]:
    """Three records, each a request of its own; their offsets or what became of them."""
    producer = RecordProducer(settings)
    sent = [await producer.enqueue(TOPIC, b"%d" % i) for i in range(3)]
    done = await asyncio.gather(*sent, return_exceptions=True)
    await producer.aclose()
    return [place if isinstance(place, BaseException) else place.offset for place in done]


async def test_a_refused_first_record_is_written_before_the_next(cluster: MockCluster) -> None:
    settings = KafkaSettings(bootstrap=cluster.bootstrap, client={"batch.num.messages": "1"})
    assert await _send(settings) == [0, 1, 2]
    assert [r.value for r in read_range(settings, TOPIC, 0)] == [b"0", b"1", b"2"]


async def test_what_librdkafka_only_infers_is_no_success(cluster: MockCluster) -> None:
    """With more than one request in flight the broker takes the second record as the first."""
    settings = KafkaSettings(
        bootstrap=cluster.bootstrap,
        client={"batch.num.messages": "1", "max.in.flight.requests.per.connection": "5"},
    )
    lost, *rest = await _send(settings)
    assert isinstance(lost, PlatformFaultError) and lost.retryable
    assert "did not say where" in str(lost) and "send the very same record again" in str(lost)
    assert rest == [0, 1]
    assert [r.value for r in read_range(settings, TOPIC, 0)] == [b"1", b"2"]
