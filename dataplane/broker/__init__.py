"""Brokers: the embedded one, a local Apache Kafka, or one that already runs (ADR 0002)."""

from dataplane.broker.contract import Broker, Progress
from dataplane.broker.open import attach_broker, open_broker

__all__ = ["Broker", "Progress", "attach_broker", "open_broker"]
