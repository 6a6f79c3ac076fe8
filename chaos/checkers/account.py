"""What became of every submission: accepted ones end exactly once, as they may; nothing is lost.

The account itself is the demo's (`chaos.demo.account`): one reading of the ledger for both.
"""

from collections import Counter

from chaos.checkers.verdict import Verdict, judged
from chaos.demo.account import Account, check, settle
from chaos.history import Completed, EntryRead, History, Invoked, judged_jobs, of
from dataplane.core.state import DUPLICATE_CODE
from idl.jobs import SourceRef
from idl.ledger import Ingested, Rejected


def _account(history: History) -> Account:
    account = settle((read.offset, read.entry) for read in of(EntryRead, history))
    is_judged = judged_jobs(history)
    account.jobs = {job: told for job, told in account.jobs.items() if is_judged(job)}
    # a problem starts with its job, and names have no colon
    account.problems = [one for one in account.problems if is_judged(one.partition(":")[0])]
    return account


def _answers(history: History, operation: str) -> dict[str, Completed]:
    """The best answer per job: an acknowledgement counts, whatever another try got."""
    found: dict[str, Completed] = {}
    for event in of(Completed, history):
        if event.operation == operation and (event.ack == "ok" or event.job not in found):
            found[event.job] = event
    return found


def account(history: History) -> Verdict:
    """Every accepted submission is in the ledger and ended exactly once, as its kind may end."""
    told = _account(history)
    answers = _answers(history, "submit")
    expected: dict[str, str] = {}
    for asked in of(Invoked, history):
        if asked.operation != "submit":
            continue
        answer = answers.get(asked.job)
        known = told.jobs.get(asked.job)
        if (answer is None or answer.ack != "ok") and known is None:
            continue  # nobody promised anything: it may have been lost on its way
        ends = known.ends if known else []
        met = len(ends) == 1 and ends[0] in asked.ends
        expected[asked.job] = ends[0] if met else asked.ends[0]
    problems = check(told, expected)
    ended = Counter(end for job in told.jobs.values() for end in job.ends)
    acks = Counter(answer.ack for answer in answers.values())
    return judged("account", problems, {
        "submitted": len(answers), "acknowledged": acks["ok"], "in doubt": acks["unknown"],
        "jobs": len(told.jobs), **ended,
        "attempts": sum(job.attempts for job in told.jobs.values()),
        "retries": sum(job.retries for job in told.jobs.values()),
        "results refused": told.results_refused,
    })  # fmt: skip


def decided(history: History) -> Verdict:
    """Every acknowledged queue record was ingested or rejected, exactly once; poison is rejected,
    and a second submission of an id is a duplicate."""
    fate: dict[SourceRef, list[str]] = {}
    for read in of(EntryRead, history):
        for decision in read.entry.decisions if read.valid else ():
            if isinstance(decision, Ingested):
                fate.setdefault(decision.source, []).append("ingested")
            elif isinstance(decision, Rejected):
                code = "duplicate" if decision.code == DUPLICATE_CODE else "rejected"
                fate.setdefault(decision.source, []).append(code)
    problems = []
    for place, fates in fate.items():
        if len(fates) > 1:
            problems.append(f"{_where(place)}: decided {len(fates)} times ({', '.join(fates)})")
    for event in of(Completed, history):
        if event.ack == "ok" and event.operation != "cancel":
            problems += _undecided(event, fate)
    counts = Counter(one for fates in fate.values() for one in fates)
    return judged("decided", problems, {"records": len(fate), **counts})


def _undecided(event: Completed, fate: dict[SourceRef, list[str]]) -> list[str]:
    problems = []
    for number, source in enumerate(event.sources):
        fates = fate.get(source, [])
        if not fates:
            problems.append(f"{event.job}: accepted at {_where(source)}, never decided on (lost)")
        elif event.operation == "poison" and fates[0] != "rejected":
            problems.append(f"{event.job}: poison at {_where(source)} was {fates[0]}")
        elif event.operation == "submit" and fates[0] == "rejected":
            problems.append(f"{event.job}: good, and rejected at {_where(source)}")
        elif number and fates[0] != "duplicate":
            problems.append(f"{event.job}: its second record was {fates[0]}, not a duplicate")
    return problems


def _where(source: SourceRef) -> str:
    return f"{source.topic}[{source.partition}]@{source.offset}"
