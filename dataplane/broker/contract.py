"""What every broker is to the rest of the system, however it is started."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

Progress = Callable[[str], None]
"""Receives one short line per step that takes time, for a person to read."""
BrokerKind = Literal["embedded", "apache", "existing"]


def quiet(_line: str) -> None:
    """A Progress that tells nobody."""


class Broker(Protocol):
    """A Kafka broker (or a small cluster of them) that this machine starts, or only talks to.

    Processes run in sessions of their own, so they outlive their starter; what is needed to stop
    them later is in `directory` (`attach_broker`). Their output goes to `directory/*.log` only.
    """

    @property
    def kind(self) -> BrokerKind:
        """What `KafkaSettings.kind` must be for it."""
        ...

    @property
    def bootstrap(self) -> str:
        """`HOST:PORT,…` for clients; known once started."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Live processes, in node order; empty for an existing broker."""
        ...

    @property
    def directory(self) -> Path:
        """Where data, logs and the record of the processes are."""
        ...

    @property
    def durable(self) -> bool:
        """False where a restart of the broker loses everything (embedded)."""
        ...

    def start(self, progress: Progress = quiet) -> None:
        """Starts and returns once a metadata request is answered.

        Raises PlatformFaultError (what is missing, or where the log is),
        BrokerUnavailableError (existing broker does not answer).
        """
        ...

    def healthy(self) -> bool:
        """Whether all its processes live and a metadata request is answered within 2 s."""
        ...

    def stop(self) -> None:
        """SIGTERM, wait, SIGKILL. Idempotent; a broker we did not start is left alone."""
        ...
