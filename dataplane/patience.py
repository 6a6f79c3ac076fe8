"""Starting while Kafka is away: a process waits for it, visibly, instead of ending.

A broker that restarts takes seconds; a coordinator that gave up meanwhile would leave its place
empty just when it is needed. What is wrong for good ends the process all the same: another error
at once, a Kafka that stays away after `kafka.start_wait_ms`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from dataplane.process import Readiness
from idl.errors import BrokerUnavailableError
from idl.settings import KafkaSettings

NEEDED: Final = "kafka"
"""What `/ready` says is missing meanwhile."""
PAUSE_S: Final = 0.2
"""Between two tries, each of which waits for an answer itself."""
TELL_S: Final = 10.0
"""One log line per this time: a person who looks must find it, nobody must drown in it."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Patience:
    """Tries the steps of a start again while no broker answers; all of them share one deadline."""

    def __init__(
        self, settings: KafkaSettings, readiness: Readiness, stopping: asyncio.Event
    ) -> None:
        self._deadline = time.monotonic() + settings.start_wait_ms / 1000
        self._readiness = readiness
        self._stopping = stopping
        self._told = 0.0

    async def __call__(self, step: Callable[[], Awaitable[T]]) -> T:
        """What `step()` returns, once it does.

        Raises what it raises; BrokerUnavailableError only past the deadline or while stopping.
        """
        while True:
            try:
                found = await step()
            except BrokerUnavailableError as error:
                if self._stopping.is_set() or time.monotonic() >= self._deadline:
                    raise
                self._say(error)
                await asyncio.sleep(PAUSE_S)
            else:
                self._readiness.have(NEEDED)
                return found

    def _say(self, error: BrokerUnavailableError) -> None:
        self._readiness.need(NEEDED)
        if time.monotonic() - self._told >= TELL_S:
            self._told = time.monotonic()
            log.warning("waiting for Kafka", extra={"reason": str(error)})
