"""When the reading thread reads gathered topics: at once after a rest, then every `GATHER_S`."""

from typing import Any, Final, Protocol

GATHER_S: Final = 0.004
"""After a sample of a gathered topic was taken, the next of such topics wait this long for others.
Elections and intents never wait. More would be felt in the time from submission to start."""


class Waker(Protocol):
    """What wakes the thread: a DDS WaitSet."""

    def attach(self, entity: Any, /) -> Any:
        """From now on it wakes the thread."""

    def detach(self, entity: Any, /) -> Any:
        """From now on it does not."""


class Gathering:
    """Attaches the gathered topics' read conditions to the wait set, and detaches them for as
    long as samples keep coming. Times in seconds of one monotonic clock."""

    def __init__(self, waker: Waker, conditions: list[Any]) -> None:
        self._waker = waker
        self._conditions = conditions
        self._next_read = 0.0  # 0: at rest, the conditions wake the thread
        for condition in conditions:
            waker.attach(condition)

    def wait_s(self, now: float, at_most: float) -> float:
        """How long the thread may wait for anything else."""
        return max(self._next_read - now, 0.0) if self._next_read else at_most

    def due(self, now: float) -> bool:
        """Are the gathered topics to be read?"""
        return now >= self._next_read

    def was_read(self, some: bool, now: float) -> None:
        """The gathered topics were read, and held samples or nothing."""
        if some and not self._next_read:
            for condition in self._conditions:
                self._waker.detach(condition)
        elif self._next_read and not some:
            for condition in self._conditions:
                self._waker.attach(condition)
        self._next_read = now + GATHER_S if some else 0.0
