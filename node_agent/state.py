"""The agent's state directory, `<base>/<node>`, mode 0700: one agent at a time (ADR 0006).

| file            | what                                                                     |
|-----------------|--------------------------------------------------------------------------|
| `lock`          | held (flock) while an agent of this node runs                            |
| `journal`       | `node_agent.journal`                                                     |
| `output/`       | one spool per attempt whose result is not in Kafka yet                   |
| `launcher.sock` | where the launcher is called by the agent's next process                 |
| `launcher.log`  | the launcher's standard error                                            |
"""

import fcntl
import os
import time
from collections.abc import Container
from pathlib import Path
from typing import Final

from idl.errors import ConfigError

BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
"""Changes when the machine starts anew (random(4)); no attempt lives through that."""


class StateDir:
    """The directory, locked. `close` unlocks it."""

    def __init__(self, path: Path) -> None:
        """Makes it and locks it. Raises ConfigError (cannot be used; in use)."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self.output.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot use state directory {path}: {error.strerror}; "
                "choose another with --state-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(
                f"another agent runs on state directory {path}; stop it, or give this node "
                "another --name or --state-dir"
            ) from None

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / "journal"

    @property
    def output(self) -> Path:
        """The spools' directory."""
        return self.path / "output"

    def tidy(self, wanted: Container[str]) -> None:
        """Removes spools that belong to no attempt of the journal."""
        for path in self.output.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Another agent may have it."""
        os.close(self._lock)


def state_path(config: Path, configured: str, chosen: str, node: str) -> Path:
    """`--state-dir`, else the cluster file's `state_dir`, else `state` beside the cluster file;
    below it one directory per node."""
    base = chosen or configured
    return (Path(base) if base else config.absolute().parent / "state") / node


def boot_id() -> str:
    """This boot of the machine."""
    return BOOT_ID_FILE.read_text().strip()


def boot_ms() -> int:
    """CLOCK_BOOTTIME: leases are counted with it, for it goes on while the host is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
