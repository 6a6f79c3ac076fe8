"""Where a partition begins, when it is written for the first time while we ask."""

from __future__ import annotations

from typing import Any, cast

import pytest
from confluent_kafka import Consumer

from dataplane.read import partition_watermarks
from idl.settings import KafkaSettings


class Answers:
    """A consumer that is given these answers, one after the other."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        self.left = list(answers)

    def get_watermark_offsets(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.left.pop(0)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([(0, 0)], (0, 0)),
        ([(3, 9)], (3, 9)),
        ([(7, 7), (0, 8)], (0, 8)),  # written between the two questions: 7 was no beginning
        ([(7, 7), (7, 7)], (7, 7)),  # all of it was deleted
    ],
)
def test_the_beginning_is_a_kept_offset(
    answers: list[tuple[int, int]], found: tuple[int, int]
) -> None:
    consumer = Answers(*answers)
    settings = KafkaSettings(bootstrap="127.0.0.1:9", kind="apache")
    assert partition_watermarks(cast("Consumer", consumer), settings, "t", 0, 1.0) == found
    assert consumer.left == []
