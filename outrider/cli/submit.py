"""`submit`: from a command line, a script or a job file to handles, and to their end if wanted."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from outrider.cli.common import Session, common, key_values, print_json, say
from outrider.cli.exits import JOB_FAILED, TIMED_OUT, ExitError

if TYPE_CHECKING:
    from outrider.client.client import Client, Handle
    from outrider.client.job import Submission
    from outrider.client.progress import JobEnd

FAILURES_SHOWN: Final = 10
"""Failed jobs told one by one; `outrider ls --state dead` shows the rest."""
_LIMITS: Final = (
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
    "cpu_time", "io", "cpuset",
)  # fmt: skip

JOB_OPTIONS: Final = (
    click.option("--id", "job_id", help="A name of your own: makes submitting again safe."),
    click.option("--name", help="For people; also starts the id."),
    click.option("--queue", "queue_name", help="Default: default."),
    click.option("--group", help="Names a set of jobs for ls --group and cancel --group."),
    click.option("--cpu", help="CPUs: 2, 0.5 or 500m. Default 1."),
    click.option("--memory", help="512Mi, 2G. Default 256Mi."),
    click.option("--gpus", type=int, help="Whole GPUs, or MIG instances of --gpu-profile."),
    click.option("--gpu-model", help="Part of the GPUs' product name, e.g. A100."),
    click.option("--gpu-memory", help="Of each GPU at least, e.g. 40Gi."),
    click.option("--gpu-profile", help="MIG profile, e.g. 1g.5gb."),
    click.option("--gpu-links", type=click.Choice(["any", "nvlink"]), help="Default any."),
    click.option("--gpu-share", help="A part of one GPU instead: 0.25 or 250m of its time."),
    click.option("--gpu-share-memory", help="The same by memory, e.g. 8Gi."),
    click.option("--cpu-pinning", type=click.Choice(["shared", "cores"]),
                 help="cores: whole cores for this job alone. Default shared."),
    click.option("--numa", type=click.Choice(["any", "single"]),
                 help="single: CPUs, memory and GPUs of one NUMA domain. Default any."),
    click.option("--timeout", help="Wall time per attempt: 30s, 5m. Default 5m."),
    click.option("--cpu-time", help="CPU time per attempt: 10s. Default: no limit."),
    click.option("--idle", help="Ends it after so long without output and CPU time."),
    click.option("--swap", help="Swap beside the memory. Default 0: none."),
    click.option("--io-read", help="Bytes a second read from each disk: 10M."),
    click.option("--io-write", help="Bytes a second written to each disk."),
    click.option(
        "--input", "inputs", multiple=True, metavar="NAME=FILE",
        help="A file that is there at the start, as /work/in/NAME; repeatable.",
    ),
    click.option(
        "--output", "outputs", multiple=True, metavar="NAME",
        help="A file, folder/ or pattern below /work to keep; repeatable.",
    ),
    click.option(
        "--profile", type=click.Choice(["strict", "network", "gpu"]),
        help="A preset of the isolation (docs/isolation.md). Default strict.",
    ),
    click.option("--retries", type=int, help="Attempts after the first. Default 2."),
    click.option("--priority", type=int, help="Higher goes first. Default 0."),
    click.option("--start-within", help="Dead-letter it unless it started in time."),
    click.option(
        "--exclusive", is_flag=True, default=None,
        help="Never two attempts at once, whatever fails: killed on a node that is cut off.",
    ),
    click.option("--env", "-e", "env", multiple=True, metavar="NAME=VALUE", help="Repeatable."),
    click.option(
        "--label", "labels", multiple=True, metavar="NAME=VALUE",
        help="Only on nodes with this label; repeatable.",
    ),
    click.option("--image", metavar="NAME",
                 help="Its root: an image of the nodes (`outrider nodes`). Default: the host's."),
    click.option("--network", type=click.Choice(["none", "host"]), help="Default none."),
    click.option(
        "--require", multiple=True, type=click.Choice(_LIMITS),
        help="What a node must enforce; repeatable. Default: everything.",
    ),
    click.option(
        "--allow-unenforced", multiple=True, type=click.Choice(_LIMITS),
        help="Run also where this is not enforced; repeatable.",
    ),
)  # fmt: skip


def _job_options(command: Any) -> Any:
    for option in reversed(JOB_OPTIONS):
        command = option(command)
    return command


@click.command(context_settings={"max_content_width": 100})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE",
              help="Jobs as YAML, JSON or JSON lines ('-': stdin); repeatable.")  # fmt: skip
@click.option("--script", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="A program run as its first line says; COMMAND is its arguments.")  # fmt: skip
@click.option("--stdin", "stdin_file", metavar="FILE", help="The job's stdin ('-': ours).")
@click.option("--array", type=click.IntRange(min=1), metavar="N",
              help="N copies, ids ID-0 …, with $OUTRIDER_ARRAY_INDEX.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Until all have ended; exit code 1 if one failed.")
@click.option("--wait-timeout", default="0", metavar="DURATION", help="With --wait: at most.")
@_job_options
@common
def submit(session: Session, **options: Any) -> None:
    """Submit jobs: a COMMAND after `--`, a --script, or job files.

    Prints one job id per line once Kafka has them. With --wait, one job's output is shown as it
    was, several jobs are summed up. Interrupting the wait leaves the jobs running.

    \b
    Examples:
      outrider submit -- echo hello
      outrider submit --wait --cpu 500m --memory 128Mi --timeout 10s -- python3 -c 'print(1)'
      outrider submit --script train.sh -- --epochs 3
      outrider submit --input data.csv=data.csv --output plots/ -- python3 /opt/plot.py
      outrider submit --array 100 --group sweep -- sh -c 'echo $OUTRIDER_ARRAY_INDEX'
      outrider submit -f jobs.yaml --wait --json
    """
    from dataplane.kafka import check_reachable
    from outrider.client.client import Client

    wait, limit = options.pop("wait"), options.pop("wait_timeout")
    submissions = _submissions(options)
    check_reachable(session.settings.kafka)
    with Client(session.settings) as client:
        if wait:
            _submit_and_wait(session, client, submissions, limit)
            return
        sent = client.send(submissions)
        if session.as_json:
            print_json({"jobs": [{"job": one.job, "source": one.source} for one in sent]})
        else:
            click.echo("\n".join(one.job for one in sent))


# -- what is submitted -------------------------------------------------------------------------


def _submissions(options: dict[str, Any]) -> "list[Submission]":
    from outrider.client.job import array

    files, count = options.pop("files"), options.pop("array")
    found = _from_files(files, options) if files else [_from_options(options)]
    if count is None:
        return found
    if len(found) != 1:
        raise click.UsageError("--array copies one job; the files hold several")
    return array(found[0], count)


def _from_files(files: tuple[str, ...], options: dict[str, Any]) -> "list[Submission]":
    from outrider.client.jobfile import parse_jobs, read_job_file

    given = [name for name, value in options.items() if value not in (None, (), "")]
    if given:
        raise click.UsageError(
            f"--file holds whole jobs; say {given[0].replace('_', '-')} in the file"
        )
    return [
        submission
        for name in files
        for submission in (
            parse_jobs(sys.stdin.buffer.read(), "stdin")
            if name == "-"
            else read_job_file(Path(name))
        )
    ]


def _from_options(options: dict[str, Any]) -> "Submission":
    from outrider.client.job import Job

    command, script = tuple(options.pop("command")), options.pop("script")
    if not command and script is None:
        raise click.UsageError("nothing to submit; give `-- COMMAND...`, --script or --file")
    if script is not None and options["stdin_file"]:
        raise click.UsageError("a script is read from stdin, so --stdin is taken; use one of them")
    renamed = {"job_id": "id", "queue_name": "queue"}
    fields = {
        renamed.get(name, name): value
        for name, value in options.items()
        if value not in (None, ()) and name not in ("env", "labels", "stdin_file", "inputs")
    }
    return Job(
        () if script is not None else command,
        args=command if script is not None else (),
        script=script,
        payload=_stdin(options["stdin_file"]),
        inputs={
            name: Path(file) for name, file in key_values(options["inputs"], "--input").items()
        },
        env=key_values(options["env"], "--env"),
        node_labels=key_values(options["labels"], "--label"),
        **fields,
    ).submission()


def _inputs(pairs: tuple[str, ...]) -> dict[str, Path]:
    return {name: Path(file) for name, file in key_values(pairs, "--input").items()}


def _stdin(name: str | None) -> bytes | Path | None:
    if name is None:
        return None
    return sys.stdin.buffer.read() if name == "-" else Path(name)


# -- waiting -----------------------------------------------------------------------------------


def _submit_and_wait(
    session: Session, client: "Client", submissions: "list[Submission]", limit: str
) -> None:
    from idl.units import parse_ms

    handles = client.submit(submissions)
    try:
        _watch(session, client, handles, parse_ms(limit) / 1000 or None)
    except TimeoutError as error:
        raise ExitError(TIMED_OUT, f"{error}; the jobs go on") from error
    except KeyboardInterrupt:
        click.echo("outrider: the jobs go on; `outrider cancel` ends them", err=True)
        raise
    documents = [_document(client, handle) for handle in handles]
    failed = [one for one in documents if one["state"] != "finished"]
    if session.as_json:
        print_json({"jobs": documents})
    elif len(handles) == 1:
        _show_output(client, handles[0])
    else:
        _sum_up(documents)
    if failed:
        raise ExitError(JOB_FAILED, _failure(failed, len(documents)))


def _watch(
    session: Session, client: "Client", handles: "list[Handle]", timeout_s: float | None
) -> None:
    """Waits for all, with a progress bar where stderr is a terminal and there is something to."""
    if session.as_json or len(handles) == 1 or not sys.stderr.isatty():
        for _ in client.as_ended(handles, timeout_s):
            pass
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("jobs", total=len(handles))
        for _ in client.as_ended(handles, timeout_s):
            bar.advance(task)


def _end(handle: "Handle") -> "JobEnd | None":
    """The end, or None where the submission was rejected."""
    from outrider.client.errors import JobRejectedError

    try:
        return handle.wait(0)
    except JobRejectedError:
        return None


def _document(client: "Client", handle: "Handle") -> dict[str, Any]:
    end = _end(handle)
    if end is None:
        return {"job": handle.job, "state": "rejected", "reason": str(handle.ended.exception())}
    last = end.attempts[-1] if end.attempts else None
    return {
        "job": handle.job,
        "state": str(end.phase),
        "attempts": len(end.attempts),
        "node": last.node if last else "",
        "outcome": last.outcome if last else None,
        "exit_code": last.exit_code if last else None,
        "code": end.code,
        "reason": end.reason,
    }


def _show_output(client: "Client", handle: "Handle") -> None:
    """A single job's output, where it belongs; the whole of it where the tail was not enough."""
    end = _end(handle)
    record = None if end is None or end.source is None else client.read_result(end.source)
    if record is None:
        return
    for tail, size, stream in (
        (record.stdout_tail, record.stdout_bytes, sys.stdout),
        (record.stderr_tail, record.stderr_bytes, sys.stderr),
    ):
        stream.buffer.write(tail)
        stream.flush()
        if size > len(tail):
            click.echo(
                f"outrider: the last {len(tail)} of {size} bytes; `outrider logs {handle.job}` "
                "shows what was kept", err=True,
            )  # fmt: skip


def _sum_up(documents: list[dict[str, Any]]) -> None:
    states = Counter(one["state"] for one in documents)
    summary = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    say(f"{len(documents)} jobs: {summary}")
    failed = [one for one in documents if one["state"] != "finished"]
    for one in failed[:FAILURES_SHOWN]:
        say(f"  {one['job']}: {one.get('reason') or one.get('code') or one['state']}")
    if len(failed) > FAILURES_SHOWN:
        say(f"  … and {len(failed) - FAILURES_SHOWN} more (outrider ls --state dead)")


def _failure(failed: list[dict[str, Any]], total: int) -> str:
    if total == 1:
        one = failed[0]
        return f"job {one['job']} {one['state']}: {one.get('reason') or one.get('code')}"
    return f"{len(failed)} of {total} jobs did not finish"
