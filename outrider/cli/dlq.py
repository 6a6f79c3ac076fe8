"""`dlq`: what ended without a result, and how to try it again."""

from functools import partial
from typing import TYPE_CHECKING

import click

from outrider.cli.common import Session, age, common, now_ms, print_table, say

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dataplane.core.state import PoolState
    from idl.jobs import SourceRef
    from idl.records import DeadLetter


@click.group()
def dlq() -> None:
    """Dead letters: jobs that ran out of attempts or time, and submissions that were refused.

    Each holds the original record, every attempt, and why.
    """


def _letters(session: Session) -> "Iterator[tuple[SourceRef, DeadLetter]]":
    from dataplane.dead_letter import read_dead_letters
    from dataplane.kafka import check_reachable

    check_reachable(session.settings.kafka)
    return read_dead_letters(session.settings.kafka)


def _find(session: Session, key: str) -> "tuple[SourceRef, DeadLetter]":
    from outrider.cli.exits import NotFoundError

    chosen = choose(_letters(session), key)
    if chosen is None:
        raise NotFoundError(f"no dead letter {key!r}; `outrider dlq ls` shows all")
    return chosen


def choose(
    letters: "Iterable[tuple[SourceRef, DeadLetter]]", key: str
) -> "tuple[SourceRef, DeadLetter] | None":
    """The newest letter that has the key; else the newest of the job that is called so.

    A refused submission has a key of its own and may name the id of a job that was accepted.
    """
    exact = named = None
    for place, letter in letters:
        if letter.key == key:
            exact = place, letter
        elif letter.job == key:
            named = place, letter
    return exact or named


@dlq.command("ls")
@click.option("--queue", "queue_name", help="Only of this queue.")
@click.option("--code", help="Only with this code.")
@common
def list_letters(session: Session, queue_name: str | None, code: str | None) -> None:
    """List dead letters, oldest first.

    \b
    Examples:
      outrider dlq ls
      outrider dlq ls --queue fast --json | jq -r '.[].key'
    """
    letters = [
        letter
        for _, letter in _letters(session)
        if (queue_name is None or letter.queue == queue_name)
        and (code is None or letter.code == code)
    ]

    def human() -> None:
        now = now_ms()
        print_table(
            ("KEY", "QUEUE", "CODE", ">ATTEMPTS", ">AGE", "REASON"),
            [
                (one.key, one.queue, one.code, len(one.attempts), age(now, one.at_ms), one.reason)
                for one in letters
            ],
            empty="no dead letters",
        )

    documents = [
        {
            "key": one.key, "queue": one.queue, "job": one.job, "code": one.code,
            "reason": one.reason, "at_ms": one.at_ms, "attempts": len(one.attempts),
        }
        for one in letters
    ]  # fmt: skip
    session.answer(documents, human)


@dlq.command()
@click.argument("key")
@common
def show(session: Session, key: str) -> None:
    """One dead letter with its whole story. KEY is the job's id, or the key that `ls` shows.

    \b
    Examples:
      outrider dlq show report-17
      outrider dlq show report-17 --json | jq .letter.attempts
    """
    place, letter = _find(session, key)
    session.answer({"place": place, "letter": letter}, lambda: _tell(place, letter))


def _tell(place: "SourceRef", letter: "DeadLetter") -> None:
    say(f"{letter.key}: {letter.code}")
    say(f"  {letter.reason}")
    say(f"  queue {letter.queue}, {age(now_ms(), letter.at_ms)} ago")
    source = letter.source
    size = "no longer in Kafka" if letter.original is None else f"{len(letter.original)} bytes"
    say(f"  submitted as {source.topic}[{source.partition}]@{source.offset}, {size}")
    say(f"  kept as {place.topic}[{place.partition}]@{place.offset}")
    if letter.attempts:
        print_table(
            (">ATTEMPT", "NODE", "OUTCOME", ">EXIT", "DETAIL"),
            [
                (a.attempt, a.node, a.outcome, "-" if a.exit_code is None else a.exit_code,
                 a.detail)
                for a in letter.attempts
            ],
        )  # fmt: skip


def replay_id(job: str, state: "PoolState") -> str:
    """The first free `<job>.r<n>`: the replay of a replay counts on."""
    stem, dot, number = job.rpartition(".r")
    base, last = (stem, int(number)) if dot and number.isdigit() else (job, 0)
    while state.is_known(f"{base}.r{last + 1}"):
        last += 1
    return f"{base}.r{last + 1}"


@dlq.command()
@click.argument("keys", nargs=-1, metavar="KEY...", required=True)
@common
def replay(session: Session, keys: tuple[str, ...]) -> None:
    """Submit the original records again, as `<id>.r1`, `.r2`, …; the dead letters stay.

    \b
    Examples:
      outrider dlq replay report-17
      outrider dlq ls --json | jq -r '.[].key' | xargs outrider dlq replay
    """
    from dataplane.submit import Submitter

    view = session.view()
    replayed = []
    for key in keys:
        _, letter = _find(session, key)
        new = replay_id(letter.job or "replay", view.state)
        submitter = Submitter(session.settings.kafka, new_id=partial(str, new))
        try:
            submitted = submitter.replay_sync(letter)
        finally:
            submitter.close()
        replayed.append({"key": key, "job": submitted.job})
        if not session.as_json:
            click.echo(submitted.job)
    session.answer(replayed, lambda: None)
