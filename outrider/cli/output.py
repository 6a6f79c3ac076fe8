"""`logs` and `result`: what a job wrote."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outrider.cli.common import Session, common, print_json, print_json_line
from outrider.cli.exits import JOB_FAILED, NOT_FOUND, TIMED_OUT, ExitError, NotFoundError
from outrider.cli.usage import show_usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idl.records import LogChunk
    from outrider.client.client import Client, Handle
    from outrider.client.progress import JobEnd


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
@click.option("--output", "name", metavar="NAME",
              help="A collected file in place of $OUTRIDER_RESULT.")  # fmt: skip
@click.option("-o", "--to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the bytes there instead of to stdout.")  # fmt: skip
@click.option("--usage", is_flag=True, help="What the attempt used, and which files it left.")
@click.option("--wait", is_flag=True, help="Until the job has ended.")
@click.option("--timeout", default="0", help="With --wait: at most so long (30s, 5m).")
@common
def result(session: Session, job: str, name: str | None, to: Path | None, **how: Any) -> None:
    """What a job wrote to $OUTRIDER_RESULT, or one of its --output files, byte for byte.

    With --json: the attempt's whole record (outcome, usage, output tails; bytes as base64).
    Exit code 1 where the job failed or was cancelled (an --output of a failed job is written all
    the same), 3 where it has not ended or has no such output, 5 with --wait and --timeout.

    \b
    Examples:
      outrider result report-17 -o report.pdf
      outrider result report-17 --output plots/a.png --to a.png
      outrider result report-17 --usage
      outrider result report-17 --wait --timeout 5m
      outrider result report-17 --json | jq .usage
    """
    from outrider.client.errors import OutputMissingError

    with connected(session) as client:
        end = _end_of(found(client, job), job, how["wait"], how["timeout"])
        record = None if end.source is None else client.read_result(end.source)
        if session.as_json:
            print_json({"job": job, "state": str(end.phase), "end": end, "result": record})
        elif how["usage"]:
            show_usage(record)
        wanted = to is not None or not (session.as_json or how["usage"])
        if wanted and name is not None:
            try:
                _write(to, client.output_bytes(record, name))
            except OutputMissingError as error:
                raise NotFoundError(f"job {job}: {error}") from error
        failure = end.error()
        if failure is not None:
            raise ExitError(JOB_FAILED, str(failure))
        if wanted and name is None:
            _write(to, b"" if record is None else client.bytes_of(record))


def _end_of(handle: "Handle", job: str, wait: bool, timeout: str) -> "JobEnd":
    from idl.units import parse_ms

    if not wait and not handle.done:
        phase = handle.status().phase
        raise ExitError(NOT_FOUND, f"job {job} has no result yet: it is {phase} (--wait waits)")
    try:
        return handle.wait(parse_ms(timeout) / 1000 or None)
    except TimeoutError as error:
        raise ExitError(TIMED_OUT, str(error)) from error


def _write(to: Path | None, data: bytes) -> None:
    from outrider.local.record import write_chosen

    if to is not None:
        write_chosen(to, data)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
