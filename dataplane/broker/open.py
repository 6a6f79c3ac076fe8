"""From what a person writes (`embedded`, `apache`, `HOST:PORT,…`) to a Broker."""

from pathlib import Path

from dataplane.broker.contract import Broker


def open_broker(spec: str, directory: Path, *, nodes: int = 1) -> Broker:
    """A broker, not started yet: `embedded` | `apache` (`nodes` 1 or 3) | `HOST:PORT,HOST:PORT`.

    `directory` holds its data, logs and process record; it is created. Raises ConfigError.
    """
    raise NotImplementedError


def attach_broker(directory: Path) -> Broker | None:
    """The broker recorded in `directory` by an earlier start, to be asked or stopped.

    None where nothing is recorded. A recorded pid counts only if /proc says that the process
    started at the recorded time, so a reused pid is never signalled.
    """
    raise NotImplementedError
