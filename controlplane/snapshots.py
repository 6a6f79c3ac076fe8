"""When the leader has a snapshot written, and what it makes of the answer.

The work is a process of its own (`controlplane.snapshotter`): encoding 120,000 jobs takes 0.3 s in
one piece, and a leader's loop may not stand still for more than 10 ms.
"""

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from controlplane.snapshotter import Written
from dataplane.process import monotonic_ms
from dataplane.snapshots import newest_head
from idl.errors import PlatformFaultError
from idl.settings import ClusterSettings

LOOK_S: Final = 1.0
"""How often the leader compares the ledger's length with the last snapshot's."""
IDLE_ENTRIES_MIN: Final = 500
"""Fewer new entries are not worth a snapshot however much time has passed."""
RETRY_MS: Final = 60_000
"""After a failed attempt: Kafka is slow or the disk is full, and the ledger has everything."""
SNAPSHOT_TIMEOUT_S: Final = 120.0
"""A writer that takes longer hangs."""

log = logging.getLogger(__name__)


class SnapshotKeeper:
    """One per coordinator; does something only while `leading()`."""

    def __init__(
        self,
        settings: ClusterSettings,
        config: Path,
        leading: Callable[[], bool],
        next_offset: Callable[[], int],
        written: Callable[[Written], None],
    ) -> None:
        """`written` is told of each snapshot, on the loop."""
        self._settings = settings
        self._config = config
        self._leading = leading
        self._next_offset = next_offset
        self._written = written
        self._process: subprocess.Popen[bytes] | None = None
        self._last: int | None = None
        self._last_ms = monotonic_ms()

    async def run(self) -> None:
        """Until cancelled. A snapshot that fails is a warning and is tried again."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._leading():
                self._last = None  # another leader may write some
                continue
            try:
                if await self._is_due():
                    await self._write()
            except (PlatformFaultError, OSError, msgspec.MsgspecError) as error:
                log.warning("snapshot not written", extra={"reason": str(error)})
                await asyncio.sleep(RETRY_MS / 1000)

    async def _is_due(self) -> bool:
        policy, now = self._settings.snapshots, monotonic_ms()
        if self._next_offset() < min(policy.every_entries, IDLE_ENTRIES_MIN):
            return False
        if self._last is None:
            kafka, pool = self._settings.kafka, self._settings.pool
            found = await asyncio.to_thread(newest_head, kafka, pool)
            self._last = 0 if found is None else found[1].next_offset
            self._last_ms = now
            if self._last > self._next_offset():
                self._last = 0  # of another ledger
        grown = self._next_offset() - self._last
        late = policy.every_ms and now - self._last_ms >= policy.every_ms
        return grown >= policy.every_entries or (bool(late) and grown >= IDLE_ENTRIES_MIN)

    async def _write(self) -> None:
        module = "controlplane.snapshotter"
        arguments = ("-m", "controlplane.background", module, "--config", str(self._config))
        # On a thread, by vfork(2): uvloop's own fork stops the loop for 35 ms at 400 MB (measured).
        try:
            code, out, err = await asyncio.to_thread(self._run, [sys.executable, *arguments])
        finally:
            if self._process is not None:
                self._process.kill()  # we are being stopped; half a snapshot is none
        said = err.decode("utf-8", "replace").strip()
        if code != 0:
            raise PlatformFaultError(said[-500:] or f"it ended with {code}")
        if said:
            log.warning("snapshot", extra={"notes": said[-500:]})
        written = msgspec.json.decode(out, type=Written)
        self._last, self._last_ms = written.next_offset, monotonic_ms()
        log.info("snapshot written", extra=msgspec.to_builtins(written))
        self._written(written)

    def _run(self, command: list[str]) -> tuple[int, bytes, bytes]:
        """Exit code, stdout, stderr. Raises PlatformFaultError where it hangs, OSError."""
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            self._process = process
            try:
                out, err = process.communicate(timeout=SNAPSHOT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise PlatformFaultError(f"no answer within {SNAPSHOT_TIMEOUT_S:.0f} s") from None
            finally:
                self._process = None
        return process.returncode, out, err
