"""Operators' commands: sent through Kafka, and watched until the leader says what it did."""

import time
from typing import TYPE_CHECKING, Final

from outrider.cli.common import Session, now_ms
from outrider.cli.exits import JOB_FAILED, TIMED_OUT, ExitError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dataplane.core.validity import Verdict
    from idl.jobs import SourceRef
    from idl.ledger import LedgerEntry
    from idl.records import Command
    from outrider.client.view import LedgerView

ANSWER_TIMEOUT_S: Final = 10.0
"""A leader answers in milliseconds; this outlasts an election and a broker's failover."""
POLL_S: Final = 0.05


def give_orders(session: Session, view: "LedgerView", orders: "Mapping[str, Command]") -> None:
    """Sends orders and returns once the leader carried all out.

    Raises ExitError (refused: with its reason; no answer: the order stays and will be read).
    """
    from dataplane.commands import send_command_sync
    from dataplane.producer import RecordProducer
    from outrider.client.client import default_submitter

    kafka, by = session.settings.kafka, default_submitter()
    producer = RecordProducer(kafka, name="orders")
    try:
        waiting = {
            send_command_sync(producer, kafka, command, by=by, at_ms=now_ms()): name
            for name, command in orders.items()
        }
    finally:
        producer.close()
    refused = _await(view, waiting)
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ExitError(JOB_FAILED, f"refused for {name}: {reason}{more}")


def _await(view: "LedgerView", waiting: "dict[SourceRef, str]") -> dict[str, str]:
    """Watches the ledger until each order was answered; name → reason of those refused."""
    from idl.ledger import Commanded

    refused: dict[str, str] = {}

    def seen(_offset: int, entry: "LedgerEntry", verdict: "Verdict") -> None:
        for decision in entry.decisions if verdict.valid else ():
            if isinstance(decision, Commanded):
                name = waiting.pop(decision.source, None)
                if name is not None and decision.refused:
                    refused[name] = decision.refused

    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while waiting:
        view.advance(seen)
        if waiting and time.monotonic() > deadline:
            raise ExitError(
                TIMED_OUT,
                f"ordered, but no leader has answered within {ANSWER_TIMEOUT_S:g} s; "
                "the order stays in Kafka and is carried out when one leads",
            )
        time.sleep(POLL_S)
    return refused
