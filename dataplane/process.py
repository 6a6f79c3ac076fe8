"""What every long-running process of ours shares: uvloop, JSON log lines, /metrics and /ready,
a clean stop on SIGTERM, one-line errors and stable exit codes.

It lives in `dataplane` because coordinator, agent and gateway may all import that and nothing of
each other.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import uvloop
from prometheus_client import make_wsgi_app

from dataplane.sampling import sample_if_asked
from idl.errors import ConfigError, OutriderError, PlatformFaultError

EXIT_OK: Final = 0
EXIT_FAULT: Final = 1
EXIT_CONFIG: Final = 2
STOP_GRACE_S: Final = 10.0
"""How long a process may take to stop after SIGTERM before it gives up and says so."""

_LOG_FIELDS: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: at, level, process, logger, message, then the call's `extra`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in record.__dict__.items() if k not in _LOG_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(process: str, level: str = "INFO") -> None:
    """Structured lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)


@dataclass
class Readiness:
    """What has to be true before a process takes work; `/ready` answers 503 and names the rest."""

    needed: set[str] = field(default_factory=set)

    def need(self, *names: str) -> None:
        """These are not there yet."""
        self.needed |= set(names)

    def have(self, name: str) -> None:
        """This is there now."""
        self.needed.discard(name)

    @property
    def ready(self) -> bool:
        """True once nothing is missing."""
        return not self.needed


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Scrapes are not worth a log line."""


def serve_metrics(address: str, port: int, readiness: Readiness) -> Callable[[], None]:
    """Serves /metrics (Prometheus) and /ready. Returns what stops it. Raises PlatformFaultError."""
    metrics = make_wsgi_app()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/ready":
            page: Iterable[bytes] = metrics(environ, start_response)
            return page
        status = "200 OK" if readiness.ready else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        waiting = sorted(readiness.needed)
        return [json.dumps({"ready": not waiting, "waiting_for": waiting}).encode()]

    try:
        server = make_server(address, port, app, _Server, handler_class=_QuietHandler)
    except OSError as error:
        raise PlatformFaultError(
            f"metrics port {address}:{port} cannot be opened ({error.strerror}); "
            "choose another with --metrics-port"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop


def now_ms() -> int:
    """Wall clock, epoch ms: what decisions are stamped with."""
    return time.time_ns() // 1_000_000


def monotonic_ms() -> int:
    """Monotonic clock in ms: what timeouts are measured with."""
    return time.monotonic_ns() // 1_000_000


def new_incarnation() -> int:
    """Start time in ns: a restarted process is told from its former self by it."""
    return time.time_ns()


async def _run_until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await main(stopping)


def run_process(name: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Runs `main(stopping)` on uvloop until it returns. `stopping` is set by SIGTERM or SIGINT.

    Returns the exit code; an error of ours is one line on stderr, a bug has its traceback.
    """
    code = EXIT_OK
    sample_if_asked(name, os.environ)
    try:
        uvloop.run(_run_until_signal(main))
    except* ConfigError as group:
        code = _say(name, group, EXIT_CONFIG)
    except* OutriderError as group:
        code = _say(name, group, EXIT_FAULT)
    return code


def _say(name: str, group: BaseExceptionGroup[Any], code: int) -> int:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    logging.getLogger(name).debug("stopped by an error", exc_info=error)
    sys.stderr.write(f"{name}: {error}\n")
    return code
