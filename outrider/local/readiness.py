"""Waiting until a local cluster works: all are ready, a leader leads, every node was seen."""

import http.client
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idl.errors import OutriderError
from outrider.local.machine import LOOPBACK
from outrider.local.process import is_alive, log_tail
from outrider.local.record import ProcessRecord

if TYPE_CHECKING:
    from dataplane.core.validity import Verdict
    from idl.ledger import LedgerEntry
    from outrider.client.view import LedgerView

POLL_S: Final = 0.05
"""Between two looks: start-up takes a second or two, a look costs under a millisecond."""
REQUEST_TIMEOUT_S: Final = 2.0


class NotReadyError(OutriderError):
    """It will not become ready, or not in time. `process` names the guilty one, where known."""

    def __init__(self, message: str, process: str = "") -> None:
        super().__init__(message)
        self.process = process


def ask_ready(port: int, address: str = LOOPBACK) -> tuple[bool, str]:
    """Whether /ready on this port says yes, and otherwise what it waits for."""
    connection = http.client.HTTPConnection(address, port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = json.loads(answer.read() or b"{}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return False, f"no answer on port {port} ({type(error).__name__})"
    finally:
        connection.close()
    waiting = ", ".join(body.get("waiting_for", ())) if isinstance(body, dict) else ""
    return answer.status == http.HTTPStatus.OK, f"it waits for {waiting}" if waiting else ""


def _last_words(record: ProcessRecord) -> str:
    """The one line that our processes leave on stderr, where it is not a log line (JSON)."""
    last = log_tail(Path(record.log), lines=1)
    return "" if last.startswith(("{", "(")) else f" ({last})"


def _check_alive(record: ProcessRecord, exit_code: Callable[[str], int | None]) -> None:
    alive = record.identity is not None and is_alive(record.identity)
    code = exit_code(record.name)  # asked for last: whoever ended in between has one, too
    if code is not None:
        raise NotReadyError(
            f"{record.role} {record.name} ended with exit code {code} while starting"
            f"{_last_words(record)}; its log is {record.log}",
            record.name,
        )
    if not alive:
        raise NotReadyError(f"{record.role} {record.name} ended; see {record.log}", record.name)


def wait_ready(
    records: Sequence[ProcessRecord],
    deadline: float,
    exit_code: Callable[[str], int | None],
    progress: Callable[[str], None],
) -> None:
    """Returns once all answer /ready with yes. Raises NotReadyError (ended, or past `deadline`)."""
    waiting = {record.name: record for record in records}
    progress(f"waiting for {', '.join(waiting)}")
    while waiting:
        reason = ""
        for record in list(waiting.values()):
            _check_alive(record, exit_code)
            ready, reason = ask_ready(record.metrics_port, record.metrics_address)
            if ready:
                del waiting[record.name]
        if not waiting:
            return
        if time.monotonic() > deadline:
            late = next(iter(waiting.values()))
            _, reason = ask_ready(late.metrics_port, late.metrics_address)
            raise NotReadyError(
                f"{late.role} {late.name} is not ready in time ({reason or 'no reason given'}); "
                f"its log is {late.log}",
                late.name,
            )
        time.sleep(POLL_S)


def wait_led(
    view: "LedgerView", nodes: set[str], deadline: float, progress: Callable[[str], None]
) -> None:
    """Returns once a term was started and all `nodes` are there. Raises NotReadyError.

    Only a term that the ledger gains beyond `view` counts: an earlier run may have left a leader.
    A node of an earlier run counts once its agent is ready: an agent that kept its state directory
    comes back as the same incarnation, and the ledger has nothing new to say of it (ADR 0006).
    """
    from idl.ledger import TermStarted

    missing, led = set(nodes), False

    def seen(_offset: int, entry: "LedgerEntry", verdict: "Verdict") -> None:
        nonlocal led
        for decision in entry.decisions if verdict.valid else ():
            if isinstance(decision, TermStarted) and not led:
                led = True
                progress(f"{entry.leader} leads in term {entry.term}; waiting for nodes")

    progress("waiting for a leader")
    while True:
        view.advance(seen)
        known = view.state.nodes
        missing = {name for name in nodes if name not in known or known[name].lost}
        if led and not missing:
            return
        if time.monotonic() > deadline:
            late = min(missing, default="")
            what = f"the leader has not seen {', '.join(sorted(missing))}" if led else "no leader"
            raise NotReadyError(f"{what} in time", late if led else "")
        time.sleep(POLL_S)
