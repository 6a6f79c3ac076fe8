"""The account: from the ledger alone, what became of every submission. Pure (Jepsen's checkers).

It judges validity itself, entry by entry, and trusts no process of the run.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from dataplane.core.validity import TermGate
from idl.jobs import SourceRef
from idl.ledger import (
    Assigned,
    Cancelled,
    DeadLettered,
    Finished,
    Ingested,
    LedgerEntry,
    Rejected,
    Released,
    ResultRefused,
    RetryScheduled,
    TermStarted,
)


class JobAccount(msgspec.Struct):
    """One job as the ledger tells it."""

    job: str
    ends: list[str] = []
    end_detail: str = ""
    attempts: int = 0
    retries: int = 0
    accepted: list[SourceRef] = []


class Account(msgspec.Struct):
    """All of a run. `problems` is empty exactly where nothing was lost or doubled."""

    jobs: dict[str, JobAccount] = {}
    rejected: list[Rejected] = []
    terms: list[tuple[int, str, int]] = []
    entries: int = 0
    void: Counter[str] = msgspec.field(default_factory=Counter)
    results_refused: int = 0
    problems: list[str] = []


def _job(account: Account, job: str) -> JobAccount:
    found = account.jobs.get(job)
    if found is None:
        account.problems.append(f"{job}: decided on, but never ingested")
        found = account.jobs.setdefault(job, JobAccount(job=job))
    return found


def _apply(account: Account, decision: object, at_ms: int, leader: str, term: int) -> None:
    match decision:
        case TermStarted():
            account.terms.append((term, leader, at_ms))
        case Ingested(job=spec):
            if spec.id in account.jobs:
                account.problems.append(f"{spec.id}: ingested twice")
            account.jobs[spec.id] = JobAccount(job=spec.id)
        case Rejected():
            account.rejected.append(decision)
        case Assigned(job=job):
            _job(account, job).attempts += 1
        case RetryScheduled(job=job):
            _job(account, job).retries += 1
        case Released(job=job, outcome="succeeded", source=SourceRef() as source):
            _job(account, job).accepted.append(source)
        case ResultRefused():
            account.results_refused += 1
        case Finished(job=job):
            _job(account, job).ends.append("finished")
        case DeadLettered(job=job, code=code, reason=reason):
            _job(account, job).ends.append("dead-lettered")
            _job(account, job).end_detail = f"{code}: {reason}"
        case Cancelled(job=job):
            _job(account, job).ends.append("cancelled")
        case _:
            pass


def settle(entries: Iterable[tuple[int, LedgerEntry]]) -> Account:
    """Reads the whole ledger, void entries counted apart."""
    account, gate = Account(), TermGate()
    for offset, entry in entries:
        verdict = gate.judge(offset, entry)
        account.entries += 1
        if not verdict.valid:
            account.void[verdict.reason] += 1
            continue
        for decision in entry.decisions:
            _apply(account, decision, entry.at_ms, entry.leader, entry.term)
    return account


def check(account: Account, expected: Mapping[str, str]) -> list[str]:
    """Everything wrong, in words: lost, doubled, or ended otherwise than `expected` (job → end)."""
    problems = list(account.problems)
    for job, end in expected.items():
        told = account.jobs.get(job)
        if told is None:
            problems.append(f"{job}: submitted, but not in the ledger (lost)")
        elif len(told.ends) != 1:
            problems.append(f"{job}: ended {len(told.ends)} times ({', '.join(told.ends)})")
        elif told.ends[0] != end:
            problems.append(f"{job}: {told.ends[0]} instead of {end}: {told.end_detail}")
        elif len(told.accepted) > 1:
            problems.append(f"{job}: {len(told.accepted)} accepted results")
    problems += [f"{job}: never submitted" for job in account.jobs if job not in expected]
    return problems
