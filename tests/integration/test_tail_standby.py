"""A tail that waits, connected, for the moment when its process leads."""

import asyncio

import pytest

from dataplane.tail import BEGINNING, Tail
from idl.settings import KafkaSettings
from idl.topics import TopicNames
from tests.integration.test_dataplane_records import Inbox, _fill

pytestmark = pytest.mark.timeout(60)


def _standby(settings: KafkaSettings, topic: str, inbox: Inbox) -> Tail:
    tail = Tail(
        settings, {(topic, 0): BEGINNING}, inbox.on_records, loop=asyncio.get_running_loop(),
        on_error=inbox.on_error, standby=True,
    )  # fmt: skip
    tail.start()
    return tail


@pytest.mark.parametrize(("start", "found"), [(3, [3, 4]), (BEGINNING, [0, 1, 2, 3, 4])])
async def test_it_reads_nothing_before_go_and_then_from_there(
    broker_settings: KafkaSettings, start: int, found: list[int]
) -> None:
    topic = TopicNames(broker_settings.prefix).commands
    await _fill(broker_settings, topic, 5)
    inbox = Inbox()
    tail = _standby(broker_settings, topic, inbox)
    await tail.end_offsets()
    assert not inbox.records
    tail.go({(topic, 0): start})
    await inbox.until(lambda: len(inbox.records) == len(found))
    assert [record.offset for record in inbox.records] == found
    await tail.aclose()
    assert inbox.errors == []


async def test_a_position_that_does_not_exist_is_still_an_error(
    broker_settings: KafkaSettings,
) -> None:
    topic = TopicNames(broker_settings.prefix).commands
    await _fill(broker_settings, topic, 2)
    inbox = Inbox()
    tail = _standby(broker_settings, topic, inbox)
    tail.go({(topic, 0): 50})
    await inbox.until(lambda: bool(inbox.errors))
    await tail.aclose()


async def test_a_standby_ends_without_ever_reading(broker_settings: KafkaSettings) -> None:
    topic = TopicNames(broker_settings.prefix).commands
    inbox = Inbox()
    tail = _standby(broker_settings, topic, inbox)
    await tail.aclose()
    assert not inbox.records and inbox.errors == []
