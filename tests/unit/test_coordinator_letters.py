"""Dead letters on their way to Kafka, as the driver of a pool keeps them."""

import asyncio
from typing import Any

import pytest

from controlplane import coordinator
from controlplane.coordinator import PoolCoordinator
from controlplane.core import events as ev
from idl.errors import BrokerUnavailableError, ConfigError
from idl.records import DeadLetter
from idl.settings import ClusterSettings
from tests.unit.core_builders import source

LETTER = DeadLetter(key="a", queue="default", job="a", code="x", reason="", at_ms=1,
                    source=source(3))  # fmt: skip


class Driver(PoolCoordinator):
    """Of a pool's driver, what keeps letters."""

    def __init__(self) -> None:
        self._settings = ClusterSettings()
        self._storing = set()
        self._crew: Any = self
        self._producer: Any = None
        self.spawned: list[Any] = []
        self.told: list[Any] = []

    def spawn(self, work: Any) -> None:
        self.spawned.append(work)

    def _to_core(self, event: Any) -> None:
        self.told.append(event)


async def test_a_letter_that_is_ordered_again_has_one_writer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The core orders again what is unconfirmed for long; Kafka may be away for longer."""
    monkeypatch.setattr(coordinator, "DEAD_LETTER_RETRY_S", 0.0)
    tries: list[int] = []
    written: list[DeadLetter] = []

    def fetch(*_: object) -> tuple[bytes | None, str]:
        tries.append(1)
        if len(tries) < 5:
            raise BrokerUnavailableError("away")
        return b"original", "application/json"

    async def write(_producer: object, _kafka: object, letter: DeadLetter) -> None:
        written.append(letter)

    monkeypatch.setattr(coordinator, "fetch_original", fetch)
    monkeypatch.setattr(coordinator, "write_dead_letter", write)
    driver = Driver()
    for _ in range(20):
        driver._perform(ev.WriteDeadLetter(letter=LETTER))
    (work,) = driver.spawned
    await work
    assert [letter.original for letter in written] == [b"original"]
    assert driver.told == [ev.DeadLetterWritten(key="a")]
    driver._perform(ev.WriteDeadLetter(letter=LETTER))
    assert len(driver.spawned) == 2, "once written, a new order is a new one"
    driver.spawned[1].close()


async def test_a_letter_whose_queue_is_gone_is_written_without_its_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[DeadLetter] = []

    def fetch(*_: object) -> tuple[bytes | None, str]:
        raise ConfigError("no such topic")

    async def write(_producer: object, _kafka: object, letter: DeadLetter) -> None:
        written.append(letter)

    monkeypatch.setattr(coordinator, "fetch_original", fetch)
    monkeypatch.setattr(coordinator, "write_dead_letter", write)
    driver = Driver()
    driver._perform(ev.WriteDeadLetter(letter=LETTER))
    async with asyncio.timeout(30):
        await driver.spawned[0]
    assert [(letter.key, letter.original) for letter in written] == [("a", None)]
