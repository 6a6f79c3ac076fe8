"""Keeps one launcher alive: adopts the one that is there, starts another when it dies."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings

BACKOFF_S: Final = 0.1
BACKOFF_S_MAX: Final = 30.0
"""Between starts of a launcher that keeps dying; each costs a tenth of a second of CPU."""
STEADY_S: Final = 60.0
"""One that lived for this long and died is replaced without delay."""
WAIT_S: Final = 30.0
"""How long an accepted attempt waits for a launcher before it is the platform's fault: another
node may be well."""

log = logging.getLogger(__name__)


class LauncherKeeper:
    """The launcher of one agent, whichever process it is at the moment."""

    def __init__(self, settings: SandboxSettings, home: Path, current: NativeSandbox) -> None:
        self._settings, self._home = settings, home
        self.current = current
        self._changed = asyncio.Event()
        self._closing = False
        self._upgrading = False
        self._retired = asyncio.Event()

    @classmethod
    async def open(cls, settings: SandboxSettings, home: Path) -> tuple["LauncherKeeper", bool]:
        """With the launcher that an earlier agent process left, if there is one (True), or a new
        one. Raises SandboxUnavailable."""
        found = await NativeSandbox.adopt(settings, home)
        current = found or await NativeSandbox.start(settings, home)
        return cls(settings, home, current), found is not None

    async def sandbox(self) -> NativeSandbox:
        """One that lives. Raises SandboxUnavailable after WAIT_S without.

        One that was adopted from an agent of other code or settings is replaced as soon as it is
        found idle here. Whoever is given one calls its `run` without waiting for anything between.
        """
        await self.refresh()
        try:
            async with asyncio.timeout(WAIT_S):
                while self._upgrading or not self.current.alive:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise SandboxUnavailable(
                f"the launcher died and could not be started again within {WAIT_S:g} s"
            ) from None
        return self.current

    async def refresh(self) -> None:
        """Replaces a launcher of other code or settings, if it has no job just now."""
        if self.current.outdated and self.current.alive and not self.current.busy:
            await self._retire()

    async def _retire(self) -> None:
        """Ends an idle launcher; `watch` starts the next."""
        if self._upgrading:
            return
        self._upgrading = True
        log.info("launcher replaced by the agent's own", extra={"pid": self.current.launcher_pid})
        try:
            await self.current.close()
        finally:
            self._retired.set()

    async def watch(self, restarted: Callable[[], None]) -> None:
        """Replaces a launcher that died, for ever. What it ran is reported by whoever ran it."""
        backoff_s = BACKOFF_S
        while True:
            since = time.monotonic()
            await self.current.died.wait()
            if self._closing:
                return
            if time.monotonic() - since > STEADY_S:
                backoff_s = BACKOFF_S
            if self._upgrading:
                await self._retired.wait()
            else:
                log.error("launcher died", extra={"stderr": self.current.launcher_stderr})
                await self.current.close()
            started = await self._start() if self._upgrading else None
            while started is None:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)
                started = await self._start()
            self.current, self._upgrading = started, False
            self._retired.clear()
            self._changed.set()
            restarted()
            log.info("launcher restarted", extra={"pid": started.launcher_pid})

    async def _start(self) -> NativeSandbox | None:
        try:
            return await NativeSandbox.start(self._settings, self._home)
        except SandboxUnavailable as error:
            log.warning("launcher not restarted yet", extra={"reason": str(error)})
            return None

    async def leave(self) -> None:
        """For the agent's next process: the launcher and what it runs stay; without work it ends.

        To be called before tasks that run attempts are cancelled: cancelling a run kills it.
        """
        self._closing = True
        if self.current.busy and self.current.alive:
            self.current.detach()
        else:
            await self.current.close()

    async def close(self) -> None:
        """Kills what runs and ends the launcher, unless it was left to others. Idempotent."""
        self._closing = True
        await self.current.close()
