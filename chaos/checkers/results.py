"""What the jobs wrote: one accepted result each, of the attempt that was current, readable, and
holding what the job was to write."""

import itertools

from chaos.checkers.verdict import Verdict, judged
from chaos.history import EntryRead, History, Invoked, ResultFound, judged_jobs, of
from idl.jobs import SourceRef
from idl.ledger import Assigned, Finished, Released


def results(history: History) -> Verdict:
    """Every finished job has exactly one accepted result, from its last attempt, readable, with
    the bytes that it was to write."""
    accepted: dict[str, list[tuple[int, SourceRef]]] = {}
    newest: dict[str, int] = {}
    finished: dict[str, int] = {}
    problems: list[str] = []
    is_judged = judged_jobs(history)
    for read in of(EntryRead, history):
        for decision in read.entry.decisions if read.valid else ():
            match decision:
                case Assigned(job=job, attempt=attempt):
                    newest[job] = attempt
                case Released(job=job, attempt=attempt, outcome="succeeded", source=source) if (
                    is_judged(job)
                ):
                    if source is None:
                        problems.append(f"{job} attempt {attempt}: succeeded without a result")
                        continue
                    accepted.setdefault(job, []).append((attempt, source))
                    if attempt != newest.get(job):
                        problems.append(f"{job}: result of attempt {attempt} accepted while "
                                        f"{newest.get(job)} was current")  # fmt: skip
                case Finished(job=job, attempt=attempt) if is_judged(job):
                    finished[job] = attempt
                case _:
                    pass
    found = {event.source: event for event in of(ResultFound, history)}
    wanted = {event.job: event.result for event in of(Invoked, history) if event.result}
    for job, several in accepted.items():
        if len(several) > 1:
            problems.append(f"{job}: {len(several)} accepted results")
    for job, attempt in finished.items():
        problems += _readable(job, attempt, accepted.get(job, []), found, wanted.get(job, ""))
    return judged("results", problems, {"finished": len(finished), "records": len(found)})


def _readable(
    job: str,
    attempt: int,
    accepted: list[tuple[int, SourceRef]],
    found: dict[SourceRef, ResultFound],
    wanted: str,
) -> list[str]:
    if not accepted:
        return [f"{job}: finished without an accepted result"]
    record = found.get(accepted[0][1])
    if record is None:
        return [f"{job}: its result is not where the ledger says ({accepted[0][1]})"]
    if record.unreadable:
        return [f"{job}: its result cannot be read: {record.unreadable}"]
    if (record.job, record.attempt, record.outcome) != (job, attempt, "succeeded"):
        return [f"{job} attempt {attempt}: the accepted record is of {record.job} attempt "
                f"{record.attempt} ({record.outcome})"]  # fmt: skip
    if wanted and record.sha256 != wanted:
        return [f"{job}: its result has sha256 {record.sha256}, not {wanted}"]
    return []


def overlaps(history: History) -> Verdict:
    """No two attempts of a job whose ends the leader confirmed ran at the same time, by their
    nodes' clocks. (An attempt of a lost node may run on: it is not valid any more.)"""
    counted: set[tuple[str, int]] = set()
    for read in of(EntryRead, history):
        for decision in read.entry.decisions if read.valid else ():
            if isinstance(decision, Released) and decision.source is not None:
                counted.add((decision.job, decision.attempt))
    spans: dict[str, list[ResultFound]] = {}
    for event in of(ResultFound, history):
        if (event.job, event.attempt) in counted and event.started_ms:
            spans.setdefault(event.job, []).append(event)
    problems = []
    for job, several in spans.items():
        several.sort(key=lambda span: span.attempt)
        for before, after in itertools.pairwise(several):
            if before.attempt != after.attempt and after.started_ms < before.ended_ms:
                problems.append(
                    f"{job}: attempt {after.attempt} on {after.node} started "
                    f"{before.ended_ms - after.started_ms} ms before attempt {before.attempt} on "
                    f"{before.node} had ended"
                )
    return judged("overlaps", problems, {"attempts": sum(map(len, spans.values()))})
