"""What must hold of the ledger as the observer judged it: terms, attempts, room, replay.

`attempts` and `room` are deliberately naive: they know nothing of `PoolState` and check what it
must have kept. `replay` is `PoolState` itself, as every reader and `outrider audit` use it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Final

from chaos.checkers.verdict import Verdict, judged
from chaos.history import Audited, EntryRead, Hashed, History, ObserverBroke, judged_jobs, of
from dataplane.core.state import PoolState
from idl.errors import InvariantBrokenError
from idl.ledger import (
    Assigned,
    Capacity,
    Decision,
    Ingested,
    LeaseAwaited,
    LedgerEntry,
    NodeSeen,
    Released,
    Started,
    TermStarted,
)
from outrider.client.progress import job_of

CHECK_EVERY_ENTRIES: Final = 500
"""check_invariants walks everything alive."""


def _valid(history: History) -> Iterator[EntryRead]:
    return (read for read in of(EntryRead, history) if read.valid)


def _decisions(history: History) -> Iterator[tuple[EntryRead, Decision]]:
    for read in _valid(history):
        for decision in read.entry.decisions:
            yield read, decision


def _decisions_on_jobs(history: History) -> Iterator[tuple[EntryRead, Decision]]:
    """Those on jobs that are judged one by one."""
    is_judged = judged_jobs(history)
    return (
        (read, decision) for read, decision in _decisions(history) if is_judged(job_of(decision))
    )


def _ended_cut_off(entry: LedgerEntry) -> bool:
    """The term before ended because its leader alone did not reach Kafka."""
    first = entry.decisions[0]
    return isinstance(first, TermStarted) and "alone cannot reach Kafka" in first.why


def terms(history: History) -> Verdict:
    """Of the entries that count: terms only grow, and each has one leader (one process)."""
    problems: list[str] = []
    owner: dict[int, tuple[str, int]] = {}
    newest = cut_off = 0
    for read in _valid(history):
        entry = read.entry
        if entry.term < newest:
            problems.append(f"offset {read.offset}: term {entry.term} after term {newest}")
        newest = max(newest, entry.term)
        cut_off += _ended_cut_off(entry)
        who = (entry.leader, entry.incarnation)
        first = owner.setdefault(entry.term, who)
        if first != who:
            problems.append(f"offset {read.offset}: term {entry.term} of {first[0]} is also led "
                            f"by {who[0]} ({who[1]})")  # fmt: skip
        if isinstance(entry.decisions[0], TermStarted) and entry.seq != 1:
            problems.append(f"offset {read.offset}: term {entry.term} starts with seq {entry.seq}")
    void = Counter(read.reason for read in of(EntryRead, history) if not read.valid)
    led = Counter(leader for leader, _ in owner.values())
    return judged("terms", problems, {
        "terms": len(owner), "handed over, cut off from Kafka": cut_off,
        **{f"led by {name}": n for name, n in sorted(led.items())},
        "void entries": void.total(), **{f"void: {why}": n for why, n in void.items()},
    })  # fmt: skip


def attempts(history: History) -> Verdict:
    """Never two valid attempts of a job at once; each number once, in turn; only the current one
    starts and ends."""
    problems: list[str] = []
    current: dict[str, int] = {}
    last: dict[str, int] = {}
    started = 0
    for read, decision in _decisions_on_jobs(history):
        where = f"offset {read.offset}"
        match decision:
            case Assigned(job=job, attempt=attempt):
                if job in current:
                    problems.append(f"{where}: {job} gets attempt {attempt} while "
                                    f"{current[job]} is valid")  # fmt: skip
                if attempt != last.get(job, 0) + 1:
                    problems.append(f"{where}: {job} gets attempt {attempt} after {last.get(job)}")
                current[job] = last[job] = attempt
            case Started(job=job, attempt=attempt):
                started += 1
                if current.get(job) != attempt:
                    problems.append(f"{where}: {job} attempt {attempt} starts and is not valid")
            case Released(job=job, attempt=attempt):
                if current.pop(job, None) != attempt:
                    problems.append(f"{where}: {job} attempt {attempt} ends and was not valid")
            case _:
                pass
    outcomes: Counter[str] = Counter(
        decision.outcome
        for _, decision in _decisions_on_jobs(history)
        if isinstance(decision, Released)
    )
    return judged("attempts", problems, {"assigned": sum(last.values()), "started": started,
                                         **outcomes})  # fmt: skip


def exclusive(history: History) -> Verdict:
    """An attempt of an exclusive job ends by a result, or after the leader that gave it up waited,
    by its own clock, until the time that it had written down (ADR 0011)."""
    problems: list[str] = []
    jobs: set[str] = set()
    awaited: dict[str, tuple[int, int]] = {}
    given_up = 0
    for read, decision in _decisions_on_jobs(history):
        match decision:
            case Ingested(job=spec) if spec.exclusive:
                jobs.add(spec.id)
            case Assigned(job=job):
                awaited.pop(job, None)
            case LeaseAwaited(job=job, until_ms=until_ms):
                awaited[job] = (read.entry.term, until_ms)
            case Released(job=job, source=None) if job in jobs:
                given_up += 1
                term, until_ms = awaited.get(job, (0, 0))
                if term != read.entry.term or read.entry.at_ms < until_ms:
                    problems.append(f"offset {read.offset}: {job} is given up before its lease is "
                                    "over")  # fmt: skip
            case _:
                pass
    return judged("exclusive", problems, {"exclusive jobs": len(jobs), "given up": given_up})


def room(history: History) -> Verdict:
    """No node is over-committed: what its valid attempts reserve is within what it offers, by CPU,
    memory and GPU. Summed anew at every assignment."""
    problems: list[str] = []
    asked: dict[str, tuple[int, int]] = {}
    offers: dict[str, Capacity] = {}
    held: dict[str, dict[str, tuple[int, int, Assigned]]] = {}
    fullest = 0.0
    for read, decision in _decisions(history):
        match decision:
            case Ingested(job=spec):
                asked[spec.id] = (spec.resources.cpu_millis, spec.resources.memory_bytes)
            case NodeSeen(node=node, capacity=capacity):
                offers[node] = capacity
            case Released(job=job):
                for attempts_there in held.values():
                    attempts_there.pop(job, None)
            case Assigned(job=job, node=node):
                there = held.setdefault(node, {})
                cpu, memory = asked.get(job, (0, 0))
                there[job] = (max(cpu, 1000 * len(decision.cpus)), memory, decision)
                problem, share = _over(decision, offers.get(node), there)
                fullest = max(fullest, share)
                if problem:
                    problems.append(f"offset {read.offset}: {problem} (with {job})")
            case _:
                pass
    return judged("room", problems, {"nodes": len(offers), "fullest": f"{fullest:.0%}"})


def _over(
    new: Assigned, offer: Capacity | None, there: dict[str, tuple[int, int, Assigned]]
) -> tuple[str, float]:
    node = new.node
    if offer is None:
        return f"{node} gets an attempt and was never seen", 0.0
    cpu = sum(one[0] for one in there.values())
    memory = sum(one[1] for one in there.values())
    decisions = [one[2] for one in there.values()]
    gpus = [gpu for one in decisions for gpu in one.gpus]
    apart = [*gpus, *(uuid for one in decisions for uuid in one.mig)]
    cpus = [cpu for one in decisions for cpu in one.cpus]
    shares: dict[int, int] = {}
    for one in decisions:
        if one.share is not None:
            shares[one.share.gpu] = shares.get(one.share.gpu, 0) + one.share.millis
    share = max(cpu / max(1, offer.cpu_millis), memory / max(1, offer.memory_bytes))
    if cpu > offer.cpu_millis:
        return f"{node} offers {offer.cpu_millis}m CPU and holds {cpu}m", share
    if memory > offer.memory_bytes:
        return f"{node} offers {offer.memory_bytes} bytes and holds {memory}", share
    if len(gpus) != len(set(gpus)) or not set(new.gpus) <= set(offer.gpus):
        return f"{node} offers GPUs {offer.gpus} and holds {sorted(gpus)}", share
    if len(apart) != len(set(apart)) or len(cpus) != len(set(cpus)):
        return f"{node} holds a MIG instance or a pinned CPU twice", share
    if set(shares) & set(gpus) or any(millis > 1000 for millis in shares.values()):
        return f"{node} shares out more than a GPU: {shares}, whole {sorted(gpus)}", share
    return "", share


def replay(history: History) -> Verdict:
    """Folding the ledger again breaks no invariant, gives the verdicts that the observer gave, and
    the state hashes that others found at the same offsets."""
    problems = [f"observer: {event.error}" for event in of(ObserverBroke, history)]
    hashes: dict[int, list[Hashed]] = {}
    for event in of(Hashed, history):
        hashes.setdefault(event.next_offset, []).append(event)
    state, count = PoolState(), 0
    try:
        for read in of(EntryRead, history):
            problems += _applied(state, read.offset, read.entry, read.valid)
            problems += _compared(state, hashes.pop(state.next_offset, []))
            count += 1
            if count % CHECK_EVERY_ENTRIES == 0:
                state.check_invariants()
        state.check_invariants()
    except (InvariantBrokenError, ValueError) as error:
        problems.append(f"after {count} entries: {error}")
        hashes.clear()
    for late in hashes.values():
        problems += [f"{h.by} read up to {h.next_offset}, which the history lacks" for h in late]
    if problems:
        return judged("replay", problems)
    if not of(Hashed, history):
        return Verdict(checker="replay", outcome="unknown", problems=("nothing to compare with",))
    return judged("replay", (), {"entries": count, "hashes compared": len(of(Hashed, history)),
                                 "state": state.state_hash()})  # fmt: skip


def audit(history: History) -> Verdict:
    """`outrider audit`, which knows nothing but Kafka, found every invariant kept."""
    found = of(Audited, history)
    if not found:
        return Verdict(
            checker="audit", outcome="unknown", problems=("nobody ran `outrider audit`",)
        )
    problems = [f"exit code {one.exit_code}: {one.message}" for one in found if one.exit_code]
    return judged("audit", problems, {"entries": max(one.entries for one in found)})


def _applied(state: PoolState, offset: int, entry: LedgerEntry, valid: bool) -> list[str]:
    verdict = state.apply(offset, entry)
    if verdict.valid == valid:
        return []
    words = {True: "valid", False: "void"}
    return [f"offset {offset}: {words[valid]} to the observer, {words[verdict.valid]} when "
            f"replayed {verdict.reason}"]  # fmt: skip


def _compared(state: PoolState, found: list[Hashed]) -> list[str]:
    if not found:
        return []
    ours = state.state_hash()
    return [
        f"state before offset {one.next_offset}: {one.by} has {one.state_hash}, replay {ours}"
        for one in found
        if one.state_hash != ours
    ]
