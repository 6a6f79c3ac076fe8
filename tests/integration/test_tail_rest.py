"""A tail that rests between looks: on both kinds of broker."""

import asyncio
import time

import pytest

from dataplane.tail import LOOK_S, REST_S, REST_S_MAX, Tail
from idl.settings import KafkaSettings
from idl.topics import TopicNames
from tests.integration.test_dataplane_records import Inbox, _fill

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(60)]
SETTLED_S = 4 * (REST_S + LOOK_S)


async def _resting(settings: KafkaSettings, topic: str, inbox: Inbox) -> Tail:
    """Has read the two records there are, and rests."""
    await _fill(settings, topic, 2)
    tail = Tail(
        settings, {(topic, 0): 0}, inbox.on_records, loop=asyncio.get_running_loop(),
        on_error=inbox.on_error,
    )  # fmt: skip
    tail.start()
    await inbox.until(lambda: inbox.has(2))
    tail.attend(False)
    await asyncio.sleep(SETTLED_S)
    return tail


def _offsets(inbox: Inbox) -> list[int]:
    return [record.offset for record in inbox.records]


async def test_it_reads_in_one_look_what_it_is_told_to_expect(
    broker_settings: KafkaSettings,
) -> None:
    topic, inbox = TopicNames(broker_settings.prefix).commands, Inbox()
    tail = await _resting(broker_settings, topic, inbox)
    await _fill(broker_settings, topic, 3)
    tail.expect(topic, 0, 5)
    await inbox.until(lambda: inbox.has(5))
    assert _offsets(inbox) == [0, 1, 2, 3, 4]
    await tail.aclose()


async def test_it_looks_now_and_then_without_being_told(broker_settings: KafkaSettings) -> None:
    topic, inbox = TopicNames(broker_settings.prefix).commands, Inbox()
    tail = await _resting(broker_settings, topic, inbox)
    await _fill(broker_settings, topic, 1)
    await inbox.until(lambda: inbox.has(3), timeout_s=10 * REST_S_MAX)
    assert _offsets(inbox) == [0, 1, 2]
    await tail.aclose()


async def test_it_attends_at_once(broker_settings: KafkaSettings) -> None:
    topic, inbox = TopicNames(broker_settings.prefix).commands, Inbox()
    tail = await _resting(broker_settings, topic, inbox)
    await _fill(broker_settings, topic, 1)
    begun = time.monotonic()
    tail.attend(True)
    await inbox.until(lambda: inbox.has(3))
    assert time.monotonic() - begun < REST_S_MAX / 2
    await _fill(broker_settings, topic, 1)
    await inbox.until(lambda: inbox.has(4))
    assert _offsets(inbox) == [0, 1, 2, 3]
    await tail.aclose()


async def test_it_does_not_read_what_is_known(broker_settings: KafkaSettings) -> None:
    topic, inbox = TopicNames(broker_settings.prefix).commands, Inbox()
    tail = await _resting(broker_settings, topic, inbox)
    tail.skip_to(topic, 0, 4)
    await _fill(broker_settings, topic, 3)
    tail.expect(topic, 0, 5)
    await inbox.until(lambda: inbox.has(3))
    assert _offsets(inbox) == [0, 1, 4]
    await tail.aclose()


async def test_it_still_says_where_the_topic_ends_and_ends_itself(
    broker_settings: KafkaSettings,
) -> None:
    topic, inbox = TopicNames(broker_settings.prefix).commands, Inbox()
    tail = await _resting(broker_settings, topic, inbox)
    assert await tail.end_offsets() == {(topic, 0): 2}
    await tail.aclose()
    assert not inbox.errors and not inbox.stalls
