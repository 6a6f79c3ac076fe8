"""One seed, one life: work and faults for a while, then calm, and everything must have ended."""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from chaos.sim import faults
from chaos.sim.cluster import SPARE, Cluster, peer
from chaos.sim.plants import PLANTS, Plant
from chaos.sim.world import START_MS, Line, Violation, World
from controlplane.core import batch, cycle, election, inbox, leases, reach
from dataplane.core.jobs import Phase
from idl.errors import OutriderError
from idl.jobs import JobSpec, Resources, Retry
from idl.records import AddMember, CancelJob, DrainNode, RemoveMember, TransferLeader

ROUGH_MS: Final = 9_000
"""How long faults begin."""
CALM_MS: Final = 420_000
"""Longest time after the last fault until everything has ended; clocks that were 90 s wrong leave
jobs backing off for as long."""
STARTED_WITHIN_MS: Final = 30_000
"""In calm times an assigned attempt starts or ends within this (nothing is ever just forgotten)."""
JOBS: Final = 20
MEMBERS_CHANGE: Final = 0.35
"""Share of lives in which the membership changes."""
SMALL: Final[tuple[tuple[Any, str, int], ...]] = (
    (batch, "LEDGER_BATCH_DECISIONS_MAX", 6), (cycle, "RESULT_DECISIONS_MAX", 3),
    (inbox, "RESULTS_INBOX_MAX", 4), (inbox, "COMMANDS_INBOX_MAX", 2),
    (inbox, "INBOX_RECORDS_MAX", 8), (inbox, "QUEUE_INBOX_MIN", 2),
    (reach, "CUT_MS", 400), (election, "HOLD_MS", 800), (reach, "PROBE_EVERY_MS", 100),
)  # fmt: skip
"""Bounds of the product that half of the lives make small, so that they are met."""


ALWAYS: Final = ((leases, "LEASE_KILL_MS", 60),)
"""Of every life: simulated launchers wake in time, so the leader's margin may be tight."""


class Work(msgspec.Struct, frozen=True):
    """One thing that a user or an operator does. `number` is its place in the plan."""

    number: int
    at_ms: int
    kind: str
    job: str = ""


class Plan(msgspec.Struct, frozen=True):
    """All that happens to the cluster from outside: what `shrink` takes pieces from."""

    work: tuple[Work, ...]
    faults: tuple[faults.Fault, ...]


class Outcome(msgspec.Struct, frozen=True):
    """What became of one life. `violation` is "" where every invariant held."""

    seed: int
    digest: str
    steps: int
    ms: int
    entries: int
    counts: dict[str, int]
    violation: str = ""
    message: str = ""
    about: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    ledger: tuple[bytes, ...] = ()
    """The whole ledger, like `lines` only where the story is kept."""
    state_hash: str = ""


def plan(seed: int) -> Plan:
    """Work and faults of a seed."""
    dice = random.Random(f"outrider/{seed}/plan")
    work: list[tuple[int, str, str]] = []
    for number in range(JOBS):
        name, at = f"job{number}", dice.randint(0, ROUGH_MS * 2 // 3)
        work.append((at, "submit", name))
        if dice.random() < 0.1:
            work.append((at + 500, "submit", name))  # again: a duplicate
        if dice.random() < 0.15:
            work.append((at + dice.randint(0, 2_000), "cancel", name))
    if dice.random() < 0.5:
        work.append((dice.randint(0, 5_000), "poison", ""))
    if dice.random() < 0.5:
        at = dice.randint(500, 5_000)
        work += [(at, "drain", "n2"), (at + dice.randint(500, 3_000), "undrain", "n2")]
    if dice.random() < 0.3:
        work.append((dice.randint(500, ROUGH_MS), "transfer", dice.choice(("", "c1", "c2"))))
    work += _member_changes(seed)
    items = tuple(Work(number, *item) for number, item in enumerate(sorted(work)))
    return Plan(items, faults.plan(seed, ROUGH_MS))


def _member_changes(seed: int) -> list[tuple[int, str, str]]:
    """One is started and added, one is removed, perhaps another is added: in every third life."""
    dice = random.Random(f"outrider/{seed}/members")
    if dice.random() > MEMBERS_CHANGE:
        return []
    size, at = size_of(seed), dice.randint(500, 4_000)
    work = []
    for number in range(1, dice.randint(1, SPARE) + 1):
        new = f"c{size + number}"
        work += [(at, "spare", new), (at + dice.randint(0, 900), "add_member", new)]
        at += dice.randint(300, 2_500)
        work.append((at, "remove_member", f"c{dice.randint(1, size + number)}"))
        at += dice.randint(300, 2_000)
    return work


def size_of(seed: int) -> int:
    """Coordinators that a life begins with."""
    return random.Random(f"outrider/{seed}/size").choice((3, 3, 3, 1, 5))


def _spec(seed: int, work: Work) -> JobSpec:
    dice = random.Random(f"outrider/{seed}/spec/{work.job}/{work.number}")
    gpus = dice.choice((0, 0, 0, 0, 1, 2))
    never = dice.random() < 0.04
    exclusive = dice.random() < 0.3
    return JobSpec(
        command=("true",),
        env={"MS": str(dice.choice((400, 2_000, 5_000) if exclusive else (5, 50, 400, 2_000)))},
        exclusive=exclusive,
        resources=Resources(
            cpu_millis=dice.choice((500, 1_000, 2_000)), gpus=8 if never else gpus
        ),
        priority=dice.choice((0, 0, 5)),
        retry=Retry(max_attempts=4, backoff_ms=50),
        start_within_ms=3_000 if never else dice.choice((0, 0, 0, 0, 1_500)),
    )  # fmt: skip


def _do(cluster: Cluster, work: Work) -> None:
    match work.kind:
        case "submit":
            cluster.submit(work.job, _spec(cluster.seed, work))
        case "cancel":
            cluster.command(CancelJob(job=work.job))
        case "poison":
            cluster.submit("", None)
        case "transfer":
            cluster.command(TransferLeader(to=work.job))
        case "spare":
            cluster.start_coordinator(work.job)
        case "add_member":
            cluster.command(AddMember(member=peer(int(work.job[1:]))))
        case "remove_member":
            cluster.command(RemoveMember(name=work.job))
        case "drain" | "undrain":
            cluster.command(DrainNode(node=work.job, drain=work.kind == "drain"))


@contextlib.contextmanager
def _bounds(seed: int) -> Iterator[None]:
    """Bounds of all lives, and small ones for every other seed."""
    with contextlib.ExitStack() as undo:
        for module, name, value in (*ALWAYS, *(SMALL if seed % 2 else ())):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def live(
    seed: int, *, given: Plan | None = None, plant: str = "", keep_story: bool = False,
    coordinators: int = 0,
) -> Outcome:  # fmt: skip
    """One life. `given` replaces the seed's own plan; `plant` is a key of PLANTS."""
    world = World(seed, keep_story=keep_story)
    bug = PLANTS[plant]() if plant else None
    found: tuple[str, str, tuple[str, ...]] = ("", "", ())
    cluster = None
    with _bounds(seed), bug.planted() if bug else contextlib.nullcontext():
        try:
            cluster = Cluster(world, coordinators=coordinators or size_of(seed), plant=bug)
            _pass(cluster, given or plan(seed), bug)
        except Violation as error:
            found = (error.name, str(error), error.about)
        except OutriderError as error:
            found = ("core-refuses", f"{type(error).__name__}: {error}", _named(str(error)))
        except (LookupError, ValueError, AssertionError) as error:
            found = ("core-crashes", f"{type(error).__name__}: {error}", ())
    world.counts["ms:simulated"] = world.now - START_MS
    if found[0]:
        world.note(f"VIOLATION {found[1]}", "fault")
    return Outcome(
        seed=seed, digest=world.story.digest, steps=world.steps, ms=world.now,
        entries=len(cluster.kafka.ledger) if cluster else 0,
        counts=dict(sorted(world.counts.items())),
        violation=found[0], message=found[1], about=found[2], lines=tuple(world.story.lines),
        ledger=tuple(cluster.kafka.ledger) if cluster and keep_story else (),
        state_hash=cluster.checker.state.state_hash() if cluster and keep_story else "",
    )  # fmt: skip


def _named(message: str) -> tuple[str, ...]:
    """Jobs that an error of a core speaks of."""
    words = message.replace("(", " ").replace(",", " ").replace("'", " ").split()
    return tuple(
        sorted({word.rstrip(":;") for word in words if word.startswith("job") and word != "job"})
    )


def _pass(cluster: Cluster, todo: Plan, bug: Plant | None) -> None:
    world, start = cluster.world, cluster.world.now
    for item in todo.work:
        world.after(item.at_ms, lambda item=item: _do(cluster, item))  # type: ignore[misc]  # bound now
    for fault in todo.faults:
        world.after(fault.at_ms, lambda fault=fault: faults.strike(cluster, fault))  # type: ignore[misc]  # bound now
    world.run_until(start + ROUGH_MS)
    faults.heal(cluster)
    world.note("CALM: every fault is over", "fault")
    calm_since = world.now
    names = sorted({item.job for item in todo.work if item.kind == "submit"})
    ended = world.run_until(calm_since + CALM_MS, lambda: _at_rest(cluster, names, calm_since))
    _judge(cluster, names, ended)


def _at_rest(cluster: Cluster, names: list[str], calm_since: int) -> bool:
    """Nothing is left to do, for the ledger and for every node."""
    checker, now = cluster.checker, cluster.world.now
    for name, known in checker.jobs.items():
        since = max(known.since_ms, calm_since)
        if known.phase is Phase.ASSIGNED and now - since > STARTED_WITHIN_MS:
            raise Violation(
                "nothing-forgotten", f"{name}/{known.attempt} was given to {known.node} and hangs "
                f"for {now - since} ms in calm times", name, known.node,
            )  # fmt: skip
    return (
        all(name in checker.ends for name in names)
        and checker.refused + len(checker.jobs) >= cluster.submitted
        and not checker.state.dead_letters_due
        and not any(node.agent.core.known for node in cluster.nodes.values() if node.agent.alive)
        and not any(n.given_up for n in checker.state.nodes.values() if not n.lost)
        and cluster.leader is not None
        and all(p.read_to == len(cluster.kafka.ledger) for p in cluster.processes.values())
    )


def _judge(cluster: Cluster, names: list[str], ended: bool) -> None:
    """2: every accepted submission has ended; nothing is left anywhere."""
    checker, state = cluster.checker, cluster.checker.state
    missing = [name for name in names if name not in checker.ends]
    if missing:
        told = "".join(state.jobs[m].told()[-1] for m in missing if m in state.jobs)
        raise Violation("ends-once", f"never ended: {', '.join(missing)} {told}", *missing)
    if checker.refused + len(checker.jobs) != cluster.submitted:
        raise Violation("ends-once", f"{cluster.submitted} submissions, {len(checker.jobs)} jobs "
                        f"and {checker.refused} refusals")  # fmt: skip
    if state.dead_letters_due:
        due = tuple(state.dead_letters_due)
        raise Violation("dead-letter-lost", f"never stored: {', '.join(due)}", *due)
    dead = {name for name, how in checker.ends.items() if how == "DeadLettered"}
    for name in sorted(dead - checker.dead_letters.keys()):
        raise Violation("dead-letter-lost", f"{name} is dead and has no dead letter", name)
    if not ended:
        held = {n.name: list(n.agent.core.known) for n in cluster.nodes.values() if n.agent.alive}
        leader = cluster.leader.name if cluster.leader else "nobody"
        raise Violation("comes-to-rest", f"{leader} leads, nodes remember {held}")
    checker.replay(cluster.kafka.ledger)
    last = state.state_hash()
    for process in cluster.processes.values():
        if process.core.state.state_hash() != last:
            raise Violation("replay", f"{process.name} ends in another state", process.name)


def add_up(outcomes: list[Outcome]) -> Counter[str]:
    """Coverage of several lives."""
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(outcome.counts)
    return total
