"""One ledger decision as one line for people. Pure."""

from idl.ledger import (
    Assigned,
    Cancelled,
    Commanded,
    DeadLettered,
    DeadLetterStored,
    Decision,
    Finished,
    Ingested,
    LeadConfirmed,
    LeaseAwaited,
    MembersChanged,
    NodeLost,
    NodeSeen,
    Rejected,
    Released,
    ResultRefused,
    RetryScheduled,
    Started,
    TermStarted,
    Vacated,
    Waiting,
)
from idl.records import AddMember, CancelJob, Command, RemoveMember, TransferLeader
from idl.topology import format_cpu_list
from idl.units import format_bytes, format_ms


def _capacity(seen: NodeSeen) -> str:
    capacity = seen.capacity
    gpus = f", {len(capacity.gpus)} GPUs" if capacity.gpus else ""
    simulated = f", simulated {seen.topology.profile}" if seen.simulated else ""
    offers = f"{capacity.cpu_millis / 1000:g} CPU, {format_bytes(capacity.memory_bytes)}{gpus}"
    return offers + simulated


def _given(decision: Assigned) -> str:
    """Devices and CPUs of an attempt."""
    given = [f"GPUs {', '.join(map(str, decision.gpus))}"] if decision.gpus else []
    given += [f"MIG {', '.join(decision.mig)}"] if decision.mig else []
    share = decision.share
    if share is not None:
        size = format_bytes(share.memory_bytes)
        given.append(f"{share.millis}/1000 and {size} of GPU {share.gpu}")
    given += [f"CPUs {format_cpu_list(decision.cpus)}"] if decision.cpus else []
    given += [f"NUMA {', '.join(map(str, decision.mems))}"] if decision.mems else []
    return "".join(f", {one}" for one in given)


def _command(command: Command | None) -> str:
    if command is None:
        return "an unreadable command"
    if isinstance(command, CancelJob):
        return f"cancel job {command.job}"
    if isinstance(command, TransferLeader):
        return f"transfer the lead to {command.to}" if command.to else "transfer the lead"
    if isinstance(command, AddMember):
        return f"add coordinator {command.member.name}"
    if isinstance(command, RemoveMember):
        return f"remove coordinator {command.name}"
    return f"{'drain' if command.drain else 'use again'} node {command.node}"


def _by(who: str) -> str:
    return f" by {who}" if who else ""


def _about_job(decision: Decision, at_ms: int) -> str:
    match decision:
        case Ingested():
            words = " ".join(decision.job.command)
            shown = words if len(words) <= 60 else words[:59] + "…"
            return f"job {decision.job.id} accepted into {decision.queue}: {shown}"
        case Rejected():
            named = f"job {decision.job}" if decision.job else "a record"
            return f"{named} refused from {decision.queue} ({decision.code}): {decision.reason}"
        case Waiting():
            return f"job {decision.job} waits ({decision.code}): {decision.message}"
        case Assigned():
            where = f"{decision.node}{_given(decision)}"
            return f"job {decision.job} attempt {decision.attempt} placed on {where}"
        case Started():
            return f"job {decision.job} attempt {decision.attempt} runs"
        case RetryScheduled():
            delay = format_ms(max(0, decision.not_before_ms - at_ms))
            return f"job {decision.job} is tried again in {delay}: {decision.reason}"
        case LeaseAwaited():
            left = decision.until_ms - at_ms
            lasts = f"may last {format_ms(left)} more" if left > 0 else "is over"
            return (
                f"job {decision.job} attempt {decision.attempt} is given up; it is exclusive and "
                f"its lease {lasts}"
            )
        case Finished():
            return f"job {decision.job} finished with attempt {decision.attempt}"
        case DeadLettered():
            return f"job {decision.job} is dead ({decision.code}): {decision.reason}"
        case Cancelled():
            return f"job {decision.job} cancelled{_by(decision.by)}"
    return _about_attempts(decision)


def _about_attempts(decision: Decision) -> str:
    match decision:
        case Released():
            code = "" if decision.exit_code is None else f", exit code {decision.exit_code}"
            detail = f": {decision.detail}" if decision.detail else ""
            return (
                f"job {decision.job} attempt {decision.attempt} ended: "
                f"{decision.outcome}{code}{detail}"
            )
        case ResultRefused():
            return (
                f"a result of job {decision.job} attempt {decision.attempt} counts for nothing: "
                f"{decision.reason}"
            )
        case DeadLetterStored():
            return f"dead letter {decision.key} stored"
    raise TypeError(f"no words for {type(decision).__name__}")


def narrate(decision: Decision, leader: str, term: int, at_ms: int) -> str:
    """What happened, in one line. `at_ms`: the entry's time, epoch ms."""
    match decision:
        case TermStarted():
            why = f" ({decision.why})" if decision.why else ""
            return f"{leader} leads pool {decision.pool} in term {term}{why}"
        case NodeSeen():
            why = f": {decision.drain_reason}" if decision.drain_reason else ""
            draining = f", draining{why}" if decision.draining else ""
            return f"node {decision.node} is here: {_capacity(decision)}{draining}"
        case NodeLost():
            return f"node {decision.node} is lost: {decision.reason}"
        case LeadConfirmed():
            return f"{leader} still leads; {decision.leases} exclusive attempts keep their lease"
        case Vacated():
            there = ", ".join(f"{job} attempt {attempt}" for job, attempt in decision.attempts)
            return f"node {decision.node} no longer holds {there}"
        case Commanded():
            verdict = f" refused: {decision.refused}" if decision.refused else " carried out"
            return f"order{_by(decision.by)} to {_command(decision.command)}{verdict}"
        case MembersChanged():
            names = ", ".join(peer.name for peer in decision.members)
            change = f"{decision.added} added" if decision.added else f"{decision.removed} removed"
            return f"membership {decision.version}: {change}; coordinators are {names}"
    return _about_job(decision, at_ms)


def nodes_of(decision: Decision) -> str:
    """The node that a decision is about; "" where it is about none."""
    about = NodeSeen | NodeLost | Assigned | Vacated
    return decision.node if isinstance(decision, about) else ""
