"""What a tail bears from a broker that comes back, and what ends it."""

from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from dataplane import tail as tails
from dataplane.kafka import checked
from dataplane.read import partition_watermarks
from dataplane.tail import UNKNOWN_S, Tail
from idl.errors import BrokerUnavailableError, PlatformFaultError
from idl.settings import KafkaSettings

SETTINGS = KafkaSettings(bootstrap="127.0.0.1:9", kind="apache")


class Answers:
    """A consumer that is asked where partitions end."""

    def __init__(self, *answers: int | tuple[int, int]) -> None:
        self.answers = list(answers)

    def get_watermark_offsets(self, *_: object, **__: object) -> tuple[int, int]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, tuple):
            return answer
        raise KafkaException(KafkaError(answer))


def follower() -> Tail:
    return Tail(SETTINGS, {("ledger.main", 0): 7}, lambda records: None)


def check(tail: Tail, consumer: Answers) -> None:
    tail._check_positions(consumer)  # type: ignore[arg-type]  # of it, this is what is used


@pytest.mark.parametrize("code", [KafkaError._DESTROY_BROKER, KafkaError._TRANSPORT])
def test_a_broker_that_left_is_asked_again(code: int) -> None:
    error = checked(KafkaException(KafkaError(code)), "asking", SETTINGS)
    assert isinstance(error, BrokerUnavailableError)
    tail = follower()
    check(tail, Answers(code))
    assert not tail._checked
    check(tail, Answers((0, 9)))
    assert tail._checked


def test_a_broker_that_has_not_loaded_its_partitions_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(tails, "WATERMARK_TIMEOUT_S", 0.0)
    tail, unknown = follower(), Answers(KafkaError._UNKNOWN_PARTITION)
    check(tail, unknown)
    now[0] += UNKNOWN_S - 1
    check(tail, unknown)
    check(tail, Answers((0, 9)))
    assert tail._checked
    now[0] += 5
    check(tail, unknown)
    now[0] += UNKNOWN_S - 1
    check(tail, unknown)
    now[0] += 2
    with pytest.raises(PlatformFaultError, match=r"does not know ledger\.main\[0\]"):
        check(tail, unknown)


def test_what_will_not_pass_ends_it_at_once() -> None:
    with pytest.raises(PlatformFaultError, match="credentials"):
        check(follower(), Answers(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(PlatformFaultError, match="its broker lost them"):
        check(follower(), Answers((0, 3)))


def test_who_reads_once_is_told_that_it_may_try_again() -> None:
    consumer: Any = Answers(KafkaError._UNKNOWN_PARTITION)
    with pytest.raises(PlatformFaultError, match=r"does not know queue\.x") as told:
        partition_watermarks(consumer, SETTINGS, "queue.x", 1, 0.0)
    assert told.value.retryable and not isinstance(told.value, BrokerUnavailableError)
