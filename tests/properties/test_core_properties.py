"""The cores against naive models: slow, obvious code that must agree with the fast one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.sim.life import live
from controlplane.core.scheduler import Scheduler
from controlplane.core.waiting import Told
from dataplane.core.nodes import Node, shape_of, unmet_by_capacity
from dataplane.core.pending import ShapeQueue
from dataplane.core.state import PoolState
from dataplane.core.validity import TermGate
from idl import ledger as d
from idl.codec import decode_entry
from idl.jobs import JobSpec
from tests.unit.core_builders import Story, seen, spec

START = d.TermStarted(pool="main", previous_term=0)
NOTHING = d.DeadLetterStored(key="x")

entries = st.lists(
    st.builds(
        lambda term, leader, incarnation, seq, starts: d.LedgerEntry(
            term=term, leader=leader, incarnation=incarnation, seq=seq, at_ms=0,
            decisions=(START if starts else NOTHING,),
        ),
        st.integers(1, 4), st.sampled_from("ab"), st.integers(1, 2), st.integers(1, 4),
        st.booleans(),
    ),
    max_size=40,
)  # fmt: skip


def naively_valid(history: list[d.LedgerEntry], index: int) -> bool:
    """The rule by scanning all that came before, with no memory."""
    entry = history[index]
    before = [history[i] for i in range(index) if naively_valid(history, i)]
    started = [x for x in before if isinstance(x.decisions[0], d.TermStarted)]
    highest = max((x.term for x in started), default=0)
    starts = isinstance(entry.decisions[0], d.TermStarted)
    if starts and entry.seq == 1 and entry.term > highest:
        return True
    if starts or not started or entry.term != highest:
        return False
    starter = started[-1]
    own = [x for x in before if x.term == highest]
    return (entry.leader, entry.incarnation) == (
        starter.leader,
        starter.incarnation,
    ) and entry.seq == own[-1].seq + 1


@given(entries)
@settings(max_examples=150, deadline=None)
def test_the_gate_agrees_with_a_scan_of_all_history(history: list[d.LedgerEntry]) -> None:
    history = history[:14]  # the naive scan is exponential
    gate = TermGate()
    fast = [gate.judge(i, x).valid for i, x in enumerate(history)]
    assert fast == [naively_valid(history, i) for i in range(len(history))]


node_offers = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(0, 3), st.sampled_from("xy"),
              st.booleans()),
    max_size=5,
)  # fmt: skip
asks = st.lists(
    st.tuples(
        st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.sampled_from(["", "x", "y"]),
        st.integers(0, 2),
    ),
    max_size=20,
)  # fmt: skip


def by_brute_force(nodes: list[Node], specs: list[JobSpec]) -> list[tuple[str, str]]:
    """Every job in order looks at every node; nothing is remembered, nothing is indexed."""
    free = {n.name: [n.free_cpu_millis, n.free_memory_bytes, len(n.free_gpus)] for n in nodes}
    placed: list[tuple[str, str]] = []
    for job in sorted(specs, key=lambda s: (-s.priority, specs.index(s))):
        best: tuple[float, str] | None = None
        need = (job.resources.cpu_millis, job.resources.memory_bytes, job.resources.gpus)
        for node in nodes:
            has = free[node.name]
            if not node.schedulable or unmet_by_capacity(node, shape_of(job)):
                continue
            if any(h < n for h, n in zip(has, need, strict=True)):
                continue
            share = min(has[0] / node.capacity.cpu_millis, has[1] / node.capacity.memory_bytes)
            key = (float(has[2]) if job.resources.gpus else -share, node.name)
            best = key if best is None else min(best, key)
        if best is not None:
            placed.append((job.id, best[1]))
            for i in range(3):
                free[best[1]][i] -= need[i]
    return placed


@given(node_offers, asks)
@settings(max_examples=200, deadline=None)
def test_the_scheduler_places_what_brute_force_places(
    offers: list[tuple[int, int, int, str, bool]], wanted: list[tuple[int, int, int, str, int]]
) -> None:
    story = Story()
    for number, (cpu, memory, gpus, zone, draining) in enumerate(offers):
        story.add(
            seen(f"n{number}", cpu=cpu * 1_000, memory=memory * 2**30, gpus=tuple(range(gpus)),
                 labels={"zone": zone}, draining=draining)
        )  # fmt: skip
    specs = [
        spec(f"j{n}", cpu=cpu * 1_000, memory=memory * 2**30, gpus=gpus, priority=priority,
             node_labels={"zone": zone} if zone else {})
        for n, (cpu, memory, gpus, zone, priority) in enumerate(wanted)
    ]  # fmt: skip
    if specs:
        story.ingest(*specs)
    plan = Scheduler().plan(story.state, 1_000)
    assert [(p.job, p.node) for p in plan] == by_brute_force(
        list(story.state.nodes.values()), specs
    )
    for placement in plan:  # the fold checks every reservation: nothing is over-committed
        story.assign(placement.job, placement.node, placement.gpus)


EVENTS = st.tuples(st.sampled_from(("joins", "ends", "offers")), st.integers(0, 23))


@given(st.lists(EVENTS, max_size=40))
@settings(max_examples=150, deadline=None)
def test_what_a_scheduler_remembers_changes_no_plan(events: list[tuple[str, int]]) -> None:
    """Beside one that remembers nothing, while jobs come and end and nodes change."""
    story, remembers = Story(), Scheduler()
    for at, (what, n) in enumerate(events):
        if what == "joins":
            asks = {"cpu": 1_000 * (1 + n % 3), "gpus": n % 2, "priority": n % 4}
            labels = {"zone": "xyz"[n % 3]} if n > 8 else {}
            story.ingest(spec(f"j{at}", node_labels=labels, **asks))
        elif what == "offers":
            story.add(seen(f"n{n % 3}", cpu=1_000 * (n % 5), gpus=(0,) * (n % 2), draining=n > 20,
                           labels={"zone": "xy"[n // 12]}, incarnation=at + 1))  # fmt: skip
        elif what == "ends":
            running = [job for node in story.state.nodes.values() for job in node.attempts]
            for job in running[: n % 3]:
                story.release(job, d.Finished(job=job, attempt=1))
        closed = {f"n{n % 5}"}
        fresh = Scheduler().plan(story.state, 5, closed=closed)
        assert remembers.plan(story.state, 5, closed=closed) == fresh
        plan = remembers.plan(story.state, 5)
        assert plan == Scheduler().plan(story.state, 5)
        for placement in plan:
            story.place(placement)


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 30)), max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_shape_queue_is_a_sorted_set(operations: list[tuple[bool, int, int]]) -> None:
    queue, model = ShapeQueue(), dict[str, tuple[int, int, str]]()
    for add, priority, number in operations:
        name = f"j{number}"
        if add and name not in model:
            model[name] = (priority, number, name)
            queue.add(model[name])
        elif not add:
            model.pop(name, None)
            queue.remove(name)
        assert list(queue.in_order()) == sorted(model.values())
        assert not model or queue.first == min(model.values())


STEPS = st.tuples(st.sampled_from(("joins", "leaves", "tell", "reason")), st.integers(0, 5))


@given(st.lists(STEPS, max_size=60))
@settings(max_examples=300, deadline=None)
def test_everybody_who_waits_is_told_why(steps: list[tuple[str, int]]) -> None:
    """A few at a time, while jobs come and go and reasons change."""
    told, queue, knows = Told(), ShapeQueue(), dict[str, object]()

    def tell(some: int) -> None:
        due = told.due(queue)
        for job in [due.popleft() for _ in range(min(some, len(due)))]:
            if job in knows:
                knows[job] = told.why

    for at, (what, number) in enumerate(steps):
        job = f"j{number}"
        if what == "joins" and job not in knows:
            queue = queue if knows else ShapeQueue()  # as `PendingIndex` does
            queue.add((0, at, job))
            knows[job] = None
        elif what == "leaves":
            knows.pop(job, None)
            queue.remove(job)
        elif what == "reason":
            told.reason(at, ("NoNodes", f"{number}"))
        elif what == "tell":
            tell(number)
    told.reason(len(steps), ("NoNodes", "0"))
    tell(len(steps))
    assert set(knows.values()) <= {told.why}


@given(st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_replay_reproduces_the_state_and_voids_add_nothing(seed: int) -> None:
    lived = live(seed, keep_story=True)
    history = [decode_entry(i, value) for i, value in enumerate(lived.ledger)]
    replayed, doubled, filtered = PoolState(), PoolState(), PoolState()
    for offset, entry in enumerate(history):
        verdict = replayed.apply(offset, entry)
        assert doubled.apply(2 * offset, entry).valid == verdict.valid
        assert not doubled.apply(2 * offset + 1, entry).valid, "an entry applied twice is void"
        if verdict.valid:
            filtered.apply(offset, entry)
    replayed.check_invariants()
    assert replayed.state_hash() == lived.state_hash
    assert filtered.state_hash() == replayed.state_hash()
    terms_of = [(t.term, t.leader) for t in doubled.terms]
    assert terms_of == [(t.term, t.leader) for t in replayed.terms]
    assert doubled.ended == replayed.ended and doubled.positions == replayed.positions
