"""`logs` and `result`: what a job wrote."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outrider.cli.common import Session, common, print_json, print_json_line
from outrider.cli.exits import JOB_FAILED, NOT_FOUND, TIMED_OUT, ExitError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idl.records import LogChunk
    from outrider.client.client import Client, Handle


@contextmanager
def connected(session: Session) -> "Iterator[Client]":
    """A client of the cluster that is meant. Raises BrokerUnavailableError."""
    from dataplane.kafka import check_reachable
    from outrider.client.client import Client

    check_reachable(session.settings.kafka)
    with Client(session.settings) as client:
        yield client


def found(client: "Client", job: str) -> "Handle":
    """The job's handle. Raises NotFoundError."""
    from outrider.client.client import JobNotFoundError

    try:
        return client.job(job)
    except JobNotFoundError as error:
        raise NotFoundError(str(error)) from error


def _write_chunk(session: Session, chunk: "LogChunk") -> None:
    if session.as_json:
        print_json_line(
            {
                "job": chunk.job, "attempt": chunk.attempt, "seq": chunk.seq,
                "stream": chunk.stream, "at_ms": chunk.at_ms,
                "text": chunk.data.decode(errors="replace"),
            }
        )  # fmt: skip
        return
    target = sys.stdout if chunk.stream == "stdout" else sys.stderr
    target.buffer.write(chunk.data)
    target.flush()


def _attempt(handle: "Handle", wanted: int | None) -> int | None:
    """The attempt whose output is meant. Raises NotFoundError."""
    current = handle.status().attempt
    if wanted is not None and not 1 <= wanted <= current:
        raise NotFoundError(f"job {handle.job} has had {current} attempts; there is no {wanted}")
    return wanted if wanted is not None else current or None


@click.command()
@click.argument("job")
@click.option("--follow", is_flag=True, help="Until the job ends.")
@click.option("--attempt", type=click.IntRange(min=1), help="Default: the last; all with --all.")
@click.option("--all", "every", is_flag=True, help="The output of every attempt.")
@common
def logs(session: Session, job: str, follow: bool, attempt: int | None, every: bool) -> None:
    """A job's output: its stdout on stdout, its stderr on stderr.

    At most 1 MiB per attempt is kept. With --json: JSON lines, one chunk each.

    \b
    Examples:
      outrider logs report-17
      outrider logs report-17 --follow
      outrider logs report-17 --attempt 1 2>/dev/null
    """
    with connected(session) as client:
        handle = found(client, job)
        chosen = None if every or (follow and attempt is None) else _attempt(handle, attempt)
        if chosen is None and not follow and not every:
            raise NotFoundError(f"job {job} has not run yet; `outrider why {job}` tells why")
        for chunk in handle.logs(attempt=chosen, follow=follow):
            _write_chunk(session, chunk)


@click.command()
@click.argument("job")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the bytes there instead of to stdout.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Until the job has ended.")
@click.option("--timeout", default="0", help="With --wait: at most so long (30s, 5m).")
@common
def result(session: Session, job: str, output: Path | None, wait: bool, timeout: str) -> None:
    """What a job wrote to $OUTRIDER_RESULT, byte for byte.

    With --json: the attempt's whole record (outcome, usage, output tails; bytes as base64).
    Exit code 1 where the job failed or was cancelled, 3 where it has not ended, 5 with --wait
    and --timeout.

    \b
    Examples:
      outrider result report-17 -o report.pdf
      outrider result report-17 --wait --timeout 5m
      outrider result report-17 --json | jq .usage
    """
    from idl.units import parse_ms
    from outrider.local.record import write_atomically

    with connected(session) as client:
        handle = found(client, job)
        if not wait and not handle.done:
            phase = handle.status().phase
            raise ExitError(NOT_FOUND, f"job {job} has no result yet: it is {phase} (--wait waits)")
        limit_s = parse_ms(timeout) / 1000 or None
        try:
            end = handle.wait(limit_s)
        except TimeoutError as error:
            raise ExitError(TIMED_OUT, str(error)) from error
        record = None if end.source is None else client.read_result(end.source)
        if session.as_json:
            print_json({"job": job, "state": str(end.phase), "end": end, "result": record})
        failure = end.error()
        if failure is not None:
            raise ExitError(JOB_FAILED, str(failure))
        data = b"" if record is None else client.bytes_of(record)
        if output is not None:
            write_atomically(output, data)
        elif not session.as_json:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
