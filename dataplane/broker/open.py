"""From what a person writes (`embedded`, `apache`, `HOST:PORT,…`) to a Broker."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dataplane.broker import processes
from dataplane.broker.apache import ApacheBroker
from dataplane.broker.contract import Broker
from dataplane.broker.embedded import EmbeddedBroker
from dataplane.broker.existing import ExistingBroker
from idl.errors import ConfigError
from idl.settings import KafkaSettings

_ADDRESS: Final = re.compile(r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})$")


def open_broker(
    spec: str, directory: Path, *, nodes: int = 1, client: Mapping[str, str] | None = None
) -> Broker:
    """A broker, not started yet: `embedded` | `apache` (`nodes` 1 or 3) | `HOST:PORT,HOST:PORT`.

    `directory` holds its data, logs and process record; it is created by `start`. `client`:
    client settings (TLS, SASL) for asking an existing cluster. Raises ConfigError.
    """
    if spec == "embedded":
        return EmbeddedBroker(directory.absolute())
    if spec == "apache":
        return ApacheBroker(directory.absolute(), nodes)
    if not all(_ADDRESS.match(part) for part in spec.split(",")):
        raise ConfigError(
            f"broker {spec!r} is not known; write embedded, apache, or HOST:PORT[,HOST:PORT…]"
        )
    settings = KafkaSettings(bootstrap=spec, client=dict(client or {}))
    return ExistingBroker(settings, directory.absolute())


def attach_broker(directory: Path) -> Broker | None:
    """The broker recorded in `directory` by an earlier start, to be asked or stopped.

    None where nothing is recorded. A recorded pid counts only if /proc says that the process
    started at the recorded time, so a reused pid is never signalled.
    Raises PlatformFaultError where the record is damaged.
    """
    record = processes.read_record(directory)
    if record is None:
        return None
    if record.kind == "apache":
        nodes = len(record.ports) // ApacheBroker.ports_per_node or 1
        return ApacheBroker(directory.absolute(), nodes)
    return EmbeddedBroker(directory.absolute())
