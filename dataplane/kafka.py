"""Kafka client configuration from `idl.settings.KafkaSettings`, in one place."""

from idl.settings import KafkaSettings

Config = dict[str, str | int | float | bool | object]


def check_reachable(settings: KafkaSettings, timeout_s: float = 5.0) -> int:
    """How many brokers answer. Raises BrokerUnavailableError: one line that says what to do."""
    raise NotImplementedError
