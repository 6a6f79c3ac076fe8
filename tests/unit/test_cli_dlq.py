"""Which dead letter is meant by a word."""

from idl.jobs import SourceRef
from idl.records import DeadLetter
from outrider.cli.dlq import choose


def letter(key: str, job: str, reason: str) -> tuple[SourceRef, DeadLetter]:
    place = SourceRef(topic="dead-letter", partition=0, offset=0)
    return place, DeadLetter(key=key, queue="q", job=job, code="c", reason=reason, at_ms=0,
                             source=place)  # fmt: skip


LETTERS = [
    letter("q[0]@1", "report", "refused at first"),
    letter("q[0]@2", "other", "refused"),
    letter("report", "report", "ran three times"),
    letter("q[0]@3", "report", "refused again"),
    letter("q[0]@4", "other", "refused later"),
]


def reason(key: str) -> str | None:
    chosen = choose(iter(LETTERS), key)
    return None if chosen is None else chosen[1].reason


def test_the_letter_with_the_key_is_meant_whatever_else_names_the_job() -> None:
    assert reason("report") == "ran three times"
    assert reason("q[0]@1") == "refused at first"
    assert reason("q[0]@3") == "refused again"


def test_of_jobs_that_bore_the_same_id_one_after_the_other_the_newest_is_meant() -> None:
    chosen = choose(iter([*LETTERS, letter("report", "report", "a year later")]), "report")
    assert chosen is not None and chosen[1].reason == "a year later"


def test_else_the_newest_of_the_job_is_meant() -> None:
    assert reason("other") == "refused later"
    assert reason("none") is None
