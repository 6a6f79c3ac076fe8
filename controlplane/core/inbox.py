"""What was read from Kafka and is not decided yet: bounded, in order, without gaps or repeats.

The position of a partition moves only by ledger decisions, so what lies here may be dropped with
the role at any time: the next leader reads it again.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from controlplane.core.bounds import (
    COMMANDS_INBOX_MAX,
    INBOX_RESUME_SHARE,
    LIVE_RESUME_SHARE,
    RESULTS_INBOX_MAX,
)
from controlplane.core.events import CommandRead, ResultRead, SetIntake, StreamKind, Submission
from dataplane.core.state import PoolState, QueueCounters
from idl.jobs import SourceRef
from idl.limits import INBOX_RECORDS_MAX, LIVE_JOBS_MAX
from idl.settings import QueuePolicy

QUEUE_INBOX_MIN: Final = 16
"""However many queues share the inbox, each may read a little ahead."""


class Inbox:
    """Results, commands and submissions (by queue), as deques to take from the left."""

    def __init__(self, policies: Mapping[str, QueuePolicy]) -> None:
        self.results: deque[ResultRead] = deque()
        self.commands: deque[CommandRead] = deque()
        self.submissions: dict[str, deque[Submission]] = {name: deque() for name in policies}
        self.paused: set[tuple[StreamKind, str]] = set()
        self.held: set[str] = set()
        """Queues with as many live jobs as they may have."""
        self._policies = policies
        self._next: dict[tuple[str, int], int] = {}
        self._queue_max = max(INBOX_RECORDS_MAX // max(len(policies), 1), QUEUE_INBOX_MIN)

    def open(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Starts anew, empty, with every stream on and the ledger's positions."""
        self.close()
        self._next = dict(positions)

    def close(self) -> None:
        """Drops everything."""
        self.results.clear()
        self.commands.clear()
        for records in self.submissions.values():
            records.clear()
        self.paused.clear()
        self.held.clear()
        self._next.clear()

    def add_results(self, records: Iterable[ResultRead]) -> None:
        """Takes what is new of `records`."""
        self.results.extend(r for r in records if self._is_new(r.source))

    def add_commands(self, records: Iterable[CommandRead]) -> None:
        """Takes what is new of `records`."""
        self.commands.extend(r for r in records if self._is_new(r.source))

    def add_submissions(self, records: Iterable[Submission]) -> None:
        """Takes what is new of `records`; queues that nobody configured as well (refused later)."""
        for record in records:
            if self._is_new(record.source):
                self.submissions.setdefault(record.queue, deque()).append(record)

    def _is_new(self, source: SourceRef) -> bool:
        key = (source.topic, source.partition)
        if source.offset < self._next.get(key, 0):
            return False
        self._next[key] = source.offset + 1
        return True

    @property
    def empty(self) -> bool:
        """True where nothing waits for a decision."""
        return not (self.results or self.commands or any(self.submissions.values()))

    # --- backpressure -------------------------------------------------------------------------

    def live_room(self, state: PoolState, queue: str) -> int:
        """How many more live jobs the policy of `queue` allows; an unknown queue has no bound."""
        policy = self._policies.get(queue)
        if policy is None:
            return LIVE_JOBS_MAX
        return policy.live_jobs_max - (state.queues.get(queue) or QueueCounters()).live

    @staticmethod
    def pool_room(state: PoolState) -> int:
        """How many more live jobs the pool may hold in memory."""
        return LIVE_JOBS_MAX - len(state.jobs)

    def waiting(self, queue: str) -> int:
        """Submissions of `queue` that were read and are not decided."""
        return len(self.submissions.get(queue, ()))

    def why_not_admitting(self, queue: str, counters: QueueCounters) -> str:
        """Why submitters should hold back, in words; "" where they need not."""
        policy = self._policies[queue]
        if policy.depth_max and counters.pending >= policy.depth_max:
            return f"{counters.pending} pending jobs of at most {policy.depth_max}: rejecting"
        if queue in self.held:
            return (
                f"{counters.live} live jobs of at most {policy.live_jobs_max}: more wait in Kafka"
            )
        return ""

    def flow(self, state: PoolState) -> list[SetIntake]:
        """Which streams to pause or resume now; they count as such from here on."""
        changes = [
            self._flow("results", "", len(self.results), RESULTS_INBOX_MAX),
            self._flow("commands", "", len(self.commands), COMMANDS_INBOX_MAX),
        ]
        for queue in self._policies:
            self._hold(state, queue)
            changes.append(self._flow("queue", queue, self.waiting(queue), self._queue_max))
        return [change for change in changes if change is not None]

    def _hold(self, state: PoolState, queue: str) -> None:
        """Holds a queue at its bound of live jobs, or the pool's, until it is well below."""
        share = LIVE_RESUME_SHARE if queue in self.held else 1.0
        counters = state.queues.get(queue) or QueueCounters()
        below = (
            counters.live < self._policies[queue].live_jobs_max * share
            and len(state.jobs) < LIVE_JOBS_MAX * share
        )
        if below:
            self.held.discard(queue)
        else:
            self.held.add(queue)

    def _flow(self, stream: StreamKind, queue: str, waiting: int, bound: float) -> SetIntake | None:
        key = (stream, queue)
        held = stream == "queue" and queue in self.held
        if key in self.paused:
            if not held and waiting <= bound * INBOX_RESUME_SHARE:
                self.paused.discard(key)
                return SetIntake(stream=stream, queue=queue, on=True)
        elif held or waiting >= bound:
            self.paused.add(key)
            return SetIntake(stream=stream, queue=queue, on=False)
        return None
