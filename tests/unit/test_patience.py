"""A process that starts while Kafka is away waits, says so, and gives up in the end."""

import asyncio

import pytest

import dataplane.patience as module
from dataplane.patience import Patience
from dataplane.process import Readiness
from idl.errors import BrokerUnavailableError, ConfigError
from idl.settings import KafkaSettings


class Steps:
    """Fails as often as told, then returns 7."""

    def __init__(self, failures: int, readiness: Readiness) -> None:
        self.left, self.readiness = failures, readiness
        self.waited_for: list[set[str]] = []

    async def __call__(self) -> int:
        self.waited_for.append(set(self.readiness.needed))
        if self.left:
            self.left -= 1
            raise BrokerUnavailableError("nobody there")
        return 7


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


async def test_waits_until_a_broker_answers_and_shows_it() -> None:
    readiness = Readiness()
    step = Steps(3, readiness)
    assert await Patience(KafkaSettings(), readiness, asyncio.Event())(step) == 7
    assert step.waited_for == [set(), {"kafka"}, {"kafka"}, {"kafka"}]
    assert readiness.ready


async def test_gives_up_after_the_setting() -> None:
    readiness = Readiness()
    with pytest.raises(BrokerUnavailableError, match="nobody there"):
        await Patience(KafkaSettings(start_wait_ms=0), readiness, asyncio.Event())(
            Steps(1, readiness)
        )


async def test_a_stop_ends_the_wait() -> None:
    readiness, stopping = Readiness(), asyncio.Event()
    stopping.set()
    with pytest.raises(BrokerUnavailableError):
        await Patience(KafkaSettings(), readiness, stopping)(Steps(1, readiness))


async def test_what_waiting_does_not_cure_is_told_at_once() -> None:
    async def wrong() -> int:
        raise ConfigError("no such topic")

    readiness = Readiness()
    with pytest.raises(ConfigError):
        await Patience(KafkaSettings(), readiness, asyncio.Event())(wrong)
