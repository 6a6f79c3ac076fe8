"""A Kafka cluster that runs already; we only talk to it."""

from pathlib import Path

from dataplane.broker.contract import BrokerKind, Progress, quiet
from dataplane.kafka import check_reachable
from idl.errors import PlatformFaultError
from idl.settings import KafkaSettings


class ExistingBroker:
    """See `Broker`. `stop` leaves it alone: we did not start it."""

    kind: BrokerKind = "existing"
    durable = True
    pids: tuple[int, ...] = ()

    def __init__(self, settings: KafkaSettings, directory: Path) -> None:
        self._settings = settings
        self.directory = directory

    @property
    def bootstrap(self) -> str:
        """As configured."""
        return self._settings.bootstrap

    def start(self, progress: Progress = quiet) -> None:
        """Checks that it answers. Raises BrokerUnavailableError."""
        count = check_reachable(self._settings, timeout_s=10.0)
        progress(f"Kafka at {self.bootstrap} answers ({count} brokers)")

    def healthy(self) -> bool:
        """Whether it answers within 2 s."""
        try:
            return check_reachable(self._settings, timeout_s=2.0) > 0
        except PlatformFaultError:
            return False

    def stop(self) -> None:
        """Nothing: it is not ours."""
