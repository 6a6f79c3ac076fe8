"""More shapes wait than one cycle can look at: everybody has a turn, the head keeps its claim."""

from controlplane.core import events as e
from controlplane.core.bounds import WAITING_CHECKS_MAX
from controlplane.core.scheduler import Placement, Scheduler
from controlplane.core.waiting import WaitingBook
from dataplane.core.pending import ShapeQueue
from idl import ledger as d
from idl.jobs import JobSpec
from tests.unit.core_builders import MIB, Hand, Story, seen, spec

GIB = 1024 * MIB
POOR_NODES = 200
"""Of these, some lack CPUs and some lack memory. So many make a shape cost a cycle a hundredth."""
CYCLES_MAX = 12
"""By then every shape of these tests has had a turn."""
ZONE_A, ZONE_B = {"zone": "a"}, {"zone": "b"}


def big(number: int, zone: str = "a", **more: object) -> JobSpec:
    """A shape of its own. It would fit on a rich node, and on no poor one."""
    memory = 8 * GIB + number * MIB
    return spec(f"big{number}", cpu=2_000, memory=memory, node_labels={"zone": zone}, **more)


def pool() -> Story:
    """Nodes of which two could run big jobs, if they were not in use."""
    poor = [
        seen(f"p{n}", cpu=9_000, memory=GIB, labels=ZONE_A)
        if n % 2
        else seen(f"p{n}", cpu=500, memory=99 * GIB, labels=ZONE_A)
        for n in range(POOR_NODES)
    ]
    rich = [seen(name, cpu=4_000, memory=32 * GIB, labels={"zone": name}) for name in ("a", "b")]
    story = Story().add(*rich, *poor).ingest(*(spec(n, cpu=4_000) for n in ("in-a", "in-b")))
    return story.assign("in-a", "a").assign("in-b", "b")


def crowded(shapes: int) -> Story:
    """So many shapes wait, and behind them a job for which there is room."""
    return pool().ingest(*map(big, range(shapes)), spec("small", cpu=100, memory=MIB))


def cycle(scheduler: Scheduler, story: Story) -> list[Placement]:
    """As while jobs keep ending: room may have appeared before each cycle."""
    story.add(d.Vacated(node="p0", incarnation=1, attempts=()))
    plan = scheduler.plan(story.state, 100)
    for placement in plan:
        story.place(placement)
    return plan


def cycles_until(scheduler: Scheduler, story: Story, job: str) -> int:
    """How many cycles until `job` is placed."""
    for number in range(1, CYCLES_MAX + 1):
        if job in [placement.job for placement in cycle(scheduler, story)]:
            return number
    raise AssertionError(f"{job} was not placed in {CYCLES_MAX} cycles")


def end(story: Story, job: str) -> None:
    story.release(job, d.Finished(job=job, attempt=1))


def test_what_fits_is_found_behind_shapes_that_do_not_while_jobs_keep_ending() -> None:
    story, scheduler = crowded(300), Scheduler()
    assert cycle(scheduler, story) == [] and scheduler.cut_short
    assert cycles_until(scheduler, story, "small") == 5
    story.ingest(spec("later", cpu=100, memory=MIB))
    assert cycles_until(scheduler, story, "later") <= CYCLES_MAX, "in the next round"


def test_the_head_keeps_its_claim_while_those_behind_have_their_turn() -> None:
    story, scheduler = crowded(300), Scheduler()
    cycle(scheduler, story)
    cycle(scheduler, story)
    end(story, "in-a")  # room for two: those at the turn would fit as well
    story.ingest(big(999, priority=1))
    assert [placement.job for placement in cycle(scheduler, story)] == ["big999", "big0"]


def test_newcomers_do_not_keep_those_waiting_whose_turn_was_before() -> None:
    story, scheduler = pool(), Scheduler()
    story.ingest(*(big(n, zone="b" if n == 60 else "a") for n in range(300)))
    cycle(scheduler, story)
    end(story, "in-b")  # room for big60, which is neither at the head nor at the turn
    for number in range(1, CYCLES_MAX):
        story.ingest(*(big(1_000 * number + n) for n in range(100)))
        if [placement.job for placement in cycle(scheduler, story)] == ["big60"]:
            return
    raise AssertionError("big60 had no turn")


def test_those_passed_over_are_looked_at_without_any_further_event() -> None:
    story, scheduler = pool(), Scheduler()
    story.ingest(*(big(n, zone="b" if n == 60 else "a") for n in range(300)))
    for _ in range(5):
        cycle(scheduler, story)
    end(story, "in-b")
    placed = list[str]()
    while scheduler.cut_short:
        placed += [placement.job for placement in scheduler.plan(story.state, 100)]
    assert "big60" in placed


def test_in_a_quiet_pool_the_order_is_exact_however_many_wait() -> None:
    """Nothing ends meanwhile: who was looked at stays known, and nobody is overtaken."""
    story, scheduler, order = crowded(300), Scheduler(), list[str]()
    story.ingest(*map(big, range(300, 500)), spec("last", cpu=100, memory=MIB - 1))
    for _ in range(CYCLES_MAX):
        for placement in scheduler.plan(story.state, 100):
            order.append(placement.job)
            story.place(placement)
        if not scheduler.cut_short:
            break
    assert order == ["small", "last"]


def test_shapes_that_match_no_node_cost_nothing_once_they_are_known() -> None:
    story, scheduler = pool(), Scheduler()
    absent = [spec(f"absent{n}", node_labels={"host": f"h{n}"}) for n in range(1_000)]
    story.ingest(*absent, spec("never", cpu=9_500, memory=98 * GIB))
    cut_short = [bool(cycle(scheduler, story)) or scheduler.cut_short for _ in range(40)]
    assert cut_short[0] and not cut_short[-1]
    story.ingest(spec("small", cpu=100, memory=MIB))
    assert cycles_until(scheduler, story, "small") == 1
    story.add(seen("new", labels={"host": "h999"}))
    assert cycles_until(scheduler, story, "absent999") > 1, "all are looked at again, in turns"


def test_a_node_that_an_entry_changes_does_not_make_its_shapes_forgotten() -> None:
    """They find no room in this cycle, for the node takes nothing; yet they match it."""
    story, scheduler = pool(), Scheduler()
    story.ingest(big(1, zone="b"))
    end(story, "in-b")
    assert scheduler.plan(story.state, 100, closed={"b"}) == []
    assert [placement.job for placement in scheduler.plan(story.state, 100)] == ["big1"]


# --- why they wait -----------------------------------------------------------------------------

TELLING_NODES, TELLING_SHAPES = 20, 600
TELLING_CYCLES = -(-(TELLING_NODES + 1) * TELLING_SHAPES // WAITING_CHECKS_MAX)


def _telling(labels: dict[str, str] | None = None) -> list[d.NodeSeen]:
    return [seen(f"n{n}", labels=labels) for n in range(TELLING_NODES)]


def _unplaceable() -> list[JobSpec]:
    return [spec(f"j{n}", gpus=1, memory=n * MIB) for n in range(1, TELLING_SHAPES + 1)]


def test_reasons_are_found_a_few_at_a_time() -> None:
    story, book = Story().add(*_telling()).ingest(*_unplaceable()), WaitingBook()
    found = [len(list(book.look(story.state)))]
    while book.cut_short:
        found.append(len(list(book.look(story.state))))
    assert len(found) == TELLING_CYCLES == 3 and sum(found) == TELLING_SHAPES
    assert len(list(book.look(story.state))) == TELLING_SHAPES and not book.cut_short


def test_a_look_that_was_stopped_goes_on_with_the_same_shape() -> None:
    story, book = Story().add(seen()).ingest(*_unplaceable()), WaitingBook()
    (first, _), (second, _) = (next(book.look(story.state)) for _ in range(2))
    assert first is second and book.cut_short


def test_reasons_come_round_where_offers_change_in_every_cycle() -> None:
    story, book = Story().add(*_telling()).ingest(*_unplaceable()), WaitingBook()
    found: set[ShapeQueue] = set()
    for number in range(TELLING_CYCLES):
        story.add(seen("n0", labels={"try": f"{number}"}))
        found |= {queue for queue, _ in book.look(story.state)}
    assert found == set(story.state.pending.shapes.values())


def test_the_leader_goes_on_by_itself_until_everybody_is_told() -> None:
    hand = Hand()
    for node in _telling():
        hand.node(node)
    hand.pass_ms(2_000)
    for node in _telling():
        hand.status(node.node)
    hand.submit(*_unplaceable())
    _tick_while_due(hand)
    assert all(job.waiting is not None for job in hand.state.jobs.values())
    hand.node(seen("n0", labels={"zone": "b"}))
    assert _tick_while_due(hand) == TELLING_CYCLES - 1


def _tick_while_due(hand: Hand) -> int:
    """How often the leader wanted to go on at once."""
    ticks = 0
    while hand.core.next_wakeup_ms(hand.now) == hand.now + 1:
        hand.now += 1
        hand.step(e.Tick())
        hand.settle()
        ticks += 1
    return ticks
