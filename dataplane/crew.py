"""Background work of one process: the first piece that fails ends the process, none in silence."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Crew:
    """Tasks that live as long as the process. Use from its loop only."""

    def __init__(self) -> None:
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`; an exception in it is `fail`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def fail(self, error: BaseException) -> None:
        """Ends the process with this error (the first one wins)."""
        if not self._failure.done():
            self._failure.set_exception(error)

    async def until(self, stopping: asyncio.Event) -> None:
        """Returns when `stopping` is set; raises what `fail` was given."""
        stopped = asyncio.ensure_future(stopping.wait())
        waiting: set[asyncio.Future[Any]] = {stopped, self._failure}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self._failure.done():
            self._failure.result()

    async def finish(self, timeout_s: float) -> int:
        """Waits for what still runs; returns how many pieces did not end in time."""
        if not self._tasks:
            return 0
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        return len(late)

    def cancel(self) -> None:
        """Cancels what still runs."""
        for task in self._tasks:
            task.cancel()
        if self._failure.done() and not self._failure.cancelled():
            self._failure.exception()  # seen: it was raised by `until`, or we stop anyway

    def _reap(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
