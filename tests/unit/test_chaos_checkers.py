"""Every checker on a history that passes, and on histories that break exactly its rule."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

import chaos.checkers
from chaos.checkers import CHECKERS, judge, worst
from chaos.checkers.availability import gaps
from chaos.checkers.verdict import PROBLEMS_SHOWN, Verdict, judged
from chaos.history import (
    Audited,
    Completed,
    EntryRead,
    Event,
    FaultBegan,
    FaultHealed,
    Hashed,
    History,
    Invoked,
    Left,
    ObserverBroke,
    Phase,
    ProcessEnded,
    Recorder,
    ResultFound,
    RunStarted,
    read_history,
)
from chaos.report import report_of
from chaos.timeline import timeline
from dataplane.core.state import PoolState
from idl.errors import ConfigError
from idl.jobs import JobSpec, Resources, SourceRef
from idl.ledger import (
    Assigned,
    Capacity,
    Decision,
    Finished,
    Ingested,
    LeaseAwaited,
    LedgerEntry,
    NodeSeen,
    Rejected,
    Released,
    Started,
    TermStarted,
)
from idl.units import MIB

SHA = "ab" * 32


def queued(offset: int) -> SourceRef:
    return SourceRef(topic="queue.default", partition=0, offset=offset)


def result_at(offset: int) -> SourceRef:
    return SourceRef(topic="results", partition=0, offset=offset)


def entry(term: int, seq: int, *decisions: Decision, leader: str = "c1") -> LedgerEntry:
    return LedgerEntry(term=term, leader=leader, incarnation=int(leader[1:]), seq=seq, at_ms=1000,
                       decisions=decisions)  # fmt: skip


def spec(job: str) -> JobSpec:
    return JobSpec(id=job, command=("/bin/true",),
                   resources=Resources(cpu_millis=600, memory_bytes=64 * MIB))  # fmt: skip


def ingested(job: str, offset: int) -> Ingested:
    return Ingested(queue="default", source=queued(offset), job=spec(job))


SEEN = NodeSeen(node="n1", incarnation=9, enforces=(),
                capacity=Capacity(cpu_millis=1000, memory_bytes=1024 * MIB))  # fmt: skip


def lost_then_done() -> list[LedgerEntry]:
    """One job: its first attempt fails with the leader, its second succeeds under the next."""
    from idl.ledger import RetryScheduled

    return [
        entry(1, 1, TermStarted(pool="main", previous_term=0)),
        entry(1, 2, SEEN, ingested("a", 0),
              Rejected(queue="default", source=queued(1), job="", code="not-utf8-json", reason="")),
        entry(1, 3, Assigned(job="a", attempt=1, node="n1", incarnation=9)),
        entry(1, 4, Started(job="a", attempt=1)),
        entry(2, 1, TermStarted(pool="main", previous_term=1), leader="c2"),
        entry(1, 5, Finished(job="a", attempt=1)),  # a zombie's: void
        entry(2, 2, Released(job="a", attempt=1, outcome="failed", source=result_at(0)),
              RetryScheduled(job="a", attempt=1, reason="failed", not_before_ms=1), leader="c2"),
        entry(2, 3, Assigned(job="a", attempt=2, node="n1", incarnation=9), leader="c2"),
        entry(2, 4, Started(job="a", attempt=2), leader="c2"),
        entry(2, 5, Released(job="a", attempt=2, outcome="succeeded", source=result_at(1)),
              Finished(job="a", attempt=2), leader="c2"),
    ]  # fmt: skip


def reads(entries: list[LedgerEntry], void: tuple[int, ...] = (5,)) -> list[Event]:
    return [
        EntryRead(at_ms=1000 + 100 * offset, offset=offset, valid=offset not in void,
                  reason="older_term" if offset in void else "", entry=one)
        for offset, one in enumerate(entries)
    ]  # fmt: skip


def hash_of(entries: list[LedgerEntry]) -> str:
    state = PoolState()
    for offset, one in enumerate(entries):
        state.apply(offset, one)
    return state.state_hash()


def good() -> list[Event]:
    entries = lost_then_done()
    return [
        RunStarted(at_ms=990, scenario="s", seed=1, minutes=1, processes=("c1", "c2", "n1")),
        Phase(at_ms=995, name="load"),
        Invoked(at_ms=1000, operation="submit", job="a", ends=("finished",), result=SHA),
        Completed(at_ms=1001, operation="submit", job="a", ack="ok", sources=(queued(0),)),
        Invoked(at_ms=1002, operation="poison", job="p"),
        Completed(at_ms=1003, operation="poison", job="p", ack="ok", sources=(queued(1),)),
        FaultBegan(at_ms=1350, fault=1, kind="kill", targets=("c1",), hit_leader=True),
        FaultHealed(at_ms=1700, fault=1),
        *reads(entries),
        Phase(at_ms=2000, name="healed"),
        Phase(at_ms=2050, name="settled"),
        Hashed(at_ms=2100, by="fresh reader", next_offset=10, state_hash=hash_of(entries)),
        ResultFound(at_ms=2101, source=result_at(0), job="a", attempt=1, node="n1",
                    outcome="failed", started_ms=10, ended_ms=20),
        ResultFound(at_ms=2102, source=result_at(1), job="a", attempt=2, node="n1",
                    outcome="succeeded", started_ms=20, ended_ms=30, sha256=SHA),
        Audited(at_ms=2150, exit_code=0, entries=10),
        Phase(at_ms=2200, name="stopped"),
    ]  # fmt: skip


def without(history: list[Event], kind: type, **fields: object) -> list[Event]:
    def hit(event: Event) -> bool:
        return isinstance(event, kind) and all(getattr(event, k) == v for k, v in fields.items())

    assert any(hit(event) for event in history)
    return [event for event in history if not hit(event)]


def changed(history: list[Event], kind: type, where: dict[str, Any], **to: Any) -> list[Event]:
    found = [
        replace(event, **to)
        if isinstance(event, kind) and all(getattr(event, k) == v for k, v in where.items())
        else event
        for event in history
    ]
    assert found != history
    return found


def with_entry(offset: int, one: LedgerEntry) -> list[Event]:
    """`good` with another valid entry at this offset."""
    return changed(good(), EntryRead, {"offset": offset}, entry=one, valid=True, reason="")


@pytest.mark.parametrize("name", CHECKERS)
def test_a_good_history_passes(name: str) -> None:
    verdict = CHECKERS[name](tuple(good()))
    assert verdict.outcome == "pass", verdict.problems


BROKEN: list[tuple[str, str, Callable[[], list[Event]]]] = [
    ("account", "(lost)", lambda: without(good(), EntryRead)),
    ("account", "decided on, but never ingested", lambda: without(good(), EntryRead, offset=1)),
    ("account", "ended 0 times", lambda: without(good(), EntryRead, offset=9)),
    ("account", "ended 2 times", lambda: with_entry(8, entry(
        2, 4, Finished(job="a", attempt=1), leader="c2"))),
    ("account", "instead of dead-lettered", lambda: changed(
        good(), Invoked, {"job": "a"}, ends=("dead-lettered",))),
    ("account", "never submitted", lambda: without(good(), Invoked, job="a")),
    ("account", "ingested twice", lambda: with_entry(8, entry(
        2, 4, ingested("a", 7), leader="c2"))),
    ("decided", "never decided on (lost)", lambda: changed(
        good(), Completed, {"job": "a"}, sources=(queued(5),))),
    ("decided", "decided 2 times", lambda: with_entry(8, entry(
        2, 4, ingested("b", 0), leader="c2"))),
    ("decided", "poison at", lambda: changed(
        good(), Completed, {"job": "p"}, sources=(queued(0),))),
    ("decided", "good, and rejected", lambda: changed(
        good(), Completed, {"job": "a"}, sources=(queued(1),))),
    ("decided", "not a duplicate", lambda: changed(
        good(), Completed, {"job": "a"}, sources=(queued(0), queued(0)))),
    ("terms", "term 1 after term 2", lambda: changed(
        good(), EntryRead, {"offset": 5}, valid=True)),
    ("terms", "is also led by c3", lambda: with_entry(8, entry(
        2, 4, Started(job="a", attempt=2), leader="c3"))),
    ("terms", "starts with seq 4", lambda: with_entry(8, entry(
        2, 4, TermStarted(pool="main", previous_term=1), leader="c2"))),
    ("attempts", "while 1 is valid", lambda: with_entry(6, entry(
        2, 2, Started(job="a", attempt=1), leader="c2"))),
    ("attempts", "gets attempt 1 after 1", lambda: with_entry(7, entry(
        2, 3, Assigned(job="a", attempt=1, node="n1", incarnation=9), leader="c2"))),
    ("attempts", "starts and is not valid", lambda: with_entry(8, entry(
        2, 4, Started(job="a", attempt=1), leader="c2"))),
    ("attempts", "ends and was not valid", lambda: with_entry(8, entry(
        2, 4, Released(job="a", attempt=1, outcome="failed"), leader="c2"))),
    ("room", "offers 1000m CPU and holds 1200m", lambda: with_entry(3, entry(
        1, 4, ingested("b", 2), Assigned(job="b", attempt=1, node="n1", incarnation=9)))),
    ("room", "was never seen", lambda: with_entry(2, entry(
        1, 3, Assigned(job="a", attempt=1, node="n7", incarnation=9)))),
    ("room", "offers GPUs", lambda: with_entry(2, entry(
        1, 3, Assigned(job="a", attempt=1, node="n1", incarnation=9, gpus=(0,))))),
    ("exclusive", "given up before its lease is over", lambda: with_entry(1, entry(
        1, 2, SEEN, Ingested(queue="default", source=queued(0), job=replace(spec("a"),
                             exclusive=True)),
        Assigned(job="a", attempt=1, node="n1", incarnation=9, lease_ms=5),
        LeaseAwaited(job="a", attempt=1, until_ms=1001),
        Released(job="a", attempt=1, outcome="node_lost")))),
    ("results", "is not where the ledger says", lambda: without(
        good(), ResultFound, attempt=2)),
    ("results", "cannot be read", lambda: changed(
        good(), ResultFound, {"attempt": 2}, unreadable="no msgpack")),
    ("results", "the accepted record is of a attempt 3", lambda: changed(
        good(), ResultFound, {"attempt": 2}, attempt=3)),
    ("results", "not " + SHA, lambda: changed(good(), ResultFound, {"attempt": 2}, sha256="cd")),
    ("results", "2 accepted results", lambda: with_entry(6, entry(
        2, 2, Released(job="a", attempt=1, outcome="succeeded", source=result_at(0)),
        leader="c2"))),
    ("results", "while 2 was current", lambda: with_entry(9, entry(
        2, 5, Released(job="a", attempt=1, outcome="succeeded", source=result_at(1)),
        leader="c2"))),
    ("results", "finished without an accepted", lambda: with_entry(9, entry(
        2, 5, Finished(job="a", attempt=2), leader="c2"))),
    ("results", "succeeded without a result", lambda: with_entry(9, entry(
        2, 5, Released(job="a", attempt=2, outcome="succeeded"), leader="c2"))),
    ("overlaps", "started 5 ms before attempt 1", lambda: changed(
        good(), ResultFound, {"attempt": 2}, started_ms=15)),
    ("replay", "replay " + hash_of(lost_then_done()), lambda: changed(
        good(), Hashed, {}, state_hash="00")),
    ("replay", "void to the observer, valid when", lambda: changed(
        good(), EntryRead, {"offset": 9}, valid=False)),
    ("audit", "exit code 1: a job is live and ended", lambda: [*good(), Audited(
        at_ms=1, exit_code=1, message="a job is live and ended")]),
    ("replay", "which the history lacks", lambda: without(good(), EntryRead, offset=9)),
    ("replay", "observer: lost", lambda: [*good(), ObserverBroke(at_ms=1, error="lost")]),
    ("replay", "which did not succeed", lambda: with_entry(8, entry(
        2, 4, Finished(job="a", attempt=1), leader="c2"))),
    ("crashes", "c3 ended by itself", lambda: [*good(), ProcessEnded(at_ms=1, process="c3")]),
    ("leftovers", "a cgroup", lambda: [*good(), Left(at_ms=1, what="a cgroup")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "says", "make"), BROKEN, ids=[f"{n}: {s}" for n, s, _ in BROKEN])
def test_a_broken_history_fails(name: str, says: str, make: Callable[[], list[Event]]) -> None:
    verdict = CHECKERS[name](tuple(make()))
    assert verdict.outcome == "fail"
    assert says in "\n".join(verdict.problems)


def test_every_checker_that_judges_was_seen_to_fail() -> None:
    assert {name for name, _, _ in BROKEN} == CHECKERS.keys() - {"availability"}


def test_a_submission_in_doubt_may_be_lost_or_not() -> None:
    doubt = changed(good(), Completed, {"job": "a"}, ack="unknown", sources=())
    assert CHECKERS["account"](tuple(doubt)).outcome == "pass"
    lost = [event for event in doubt if not isinstance(event, EntryRead)]
    assert CHECKERS["account"](tuple(lost)).outcome == "pass"


def test_jobs_of_others_do_not_count_on_a_cluster_that_is_not_ours() -> None:
    again = [
        entry(2, 6, ingested("a", 7), leader="c2"),  # long after its first life was forgotten
        entry(2, 7, Assigned(job="a", attempt=1, node="n1", incarnation=9), leader="c2"),
        entry(2, 8, Released(job="a", attempt=1, outcome="succeeded", source=result_at(2)),
              Finished(job="a", attempt=1), leader="c2"),
    ]  # fmt: skip
    theirs = without(without(good(), Invoked, job="a"), Completed, job="a")
    theirs = [*without(theirs, ResultFound), *reads([*lost_then_done(), *again])[10:]]
    for name in ("account", "attempts", "results"):
        assert CHECKERS[name](tuple(theirs)).outcome == "fail", name
    theirs = changed(theirs, RunStarted, {}, strangers=True)
    for name in CHECKERS.keys() - {"replay"}:  # whose ledger forgets nothing here
        verdict = CHECKERS[name](tuple(theirs))
        assert verdict.outcome == "pass", verdict


def test_our_jobs_do_count_on_a_cluster_that_is_not_ours() -> None:
    theirs = changed(without(good(), ResultFound), RunStarted, {}, strangers=True)
    assert CHECKERS["results"](tuple(theirs)).outcome == "fail"
    lost = without(theirs, EntryRead, offset=1)
    assert CHECKERS["account"](tuple(lost)).outcome == "fail"


def test_a_run_with_a_fault_that_was_not_healed_is_no_pass_and_no_accusation() -> None:
    unhealed = changed(good(), FaultHealed, {"fault": 1}, error="kill of c1: cannot fork")
    told = report_of(tuple(unhealed))
    assert told.outcome == "unknown"
    assert told.verdicts[0].problems == ("kill of c1: cannot fork",)
    lost = report_of(tuple(without(unhealed, EntryRead, offset=9)))
    assert lost.outcome == "unknown"
    account = next(one for one in lost.verdicts if one.checker == "account")
    assert account.problems[0] == "not held against the cluster: a fault was not healed"
    assert "ended 0 times" in account.problems[1]


def test_what_cannot_be_judged_is_not_a_pass() -> None:
    assert CHECKERS["leftovers"](tuple(without(good(), Phase, name="stopped"))).outcome == "unknown"
    assert CHECKERS["replay"](tuple(without(good(), Hashed))).outcome == "unknown"


def test_the_worst_verdict_wins() -> None:
    ok, bad = judged("a", ()), judged("b", ("x",))
    unknown = Verdict(checker="c", outcome="unknown")
    assert worst([ok, ok]) == "pass"
    assert worst([ok, unknown]) == "unknown"
    assert worst([unknown, bad, ok]) == "fail"
    assert worst([]) == "unknown"


def test_many_problems_are_counted_not_listed() -> None:
    verdict = judged("a", (str(n) for n in range(1000)))
    assert verdict.problems[-1] == f"… and {1000 - PROBLEMS_SHOWN} more"


def test_a_silence_belongs_to_the_fault_that_hit_the_leader() -> None:
    history: History = (
        Invoked(at_ms=0, operation="submit", job="a"),
        *reads(lost_then_done()[:3], ()),  # at 1000, 1100, 1200
        FaultBegan(at_ms=1210, fault=1, kind="kill", targets=("n1",)),
        FaultBegan(at_ms=1220, fault=2, kind="pause", targets=("c1",), hit_leader=True),
        Invoked(at_ms=1230, operation="submit", job="b"),
        *[replace(one, at_ms=one.at_ms + 700) for one in reads(lost_then_done())[3:]],  # from 2000
        Invoked(at_ms=9000, operation="submit", job="c"),
    )
    first, second = gaps(history)
    assert first.length_ms == 0
    assert (second.hit_leader, second.start_ms, second.end_ms) == (True, 1230, 2000)


def test_only_some_checkers() -> None:
    assert [v.checker for v in judge(tuple(good()), ("terms", "room"))] == ["terms", "room"]


def test_the_report_tells_all() -> None:
    report = report_of(tuple(good()))
    assert (report.scenario, report.outcome, report.faults) == ("s", "pass", {"kill": 1})
    assert len(report.verdicts) == len(CHECKERS)
    assert report_of((*good(), Left(at_ms=1, what="x"))).outcome == "fail"


def test_a_history_is_judged_by_the_checkers_of_its_scenario() -> None:
    """`clocks` excludes `overlaps`: the clocks of its nodes jump."""
    jumped = changed(good(), ResultFound, {"attempt": 2}, started_ms=15)
    assert report_of(tuple(jumped)).outcome == "fail"
    chosen = changed(jumped, RunStarted, {}, checkers=("terms", "results"))
    told = report_of(tuple(chosen))
    assert [verdict.checker for verdict in told.verdicts] == ["terms", "results"]
    assert told.outcome == "pass"
    assert report_of(tuple(chosen), ("overlaps",)).outcome == "fail", "asked for by name"
    luck = changed(good(), RunStarted, {}, checkers=("luck",))
    with pytest.raises(ConfigError, match="no checker 'luck'"):
        report_of(tuple(luck))


def test_a_history_survives_its_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.jsonl", lambda: 0.0)
    recorder.add(*good())
    recorder.close()
    assert tuple(read_history(tmp_path / "h.jsonl")) == recorder.history() == tuple(good())
    (tmp_path / "h.jsonl").write_text('{"t":"luck"}\n')
    with pytest.raises(ConfigError, match="line 1 is not an event"):
        tuple(read_history(tmp_path / "h.jsonl"))


SVG = "{http://www.w3.org/2000/svg}"


def test_the_timeline_is_well_formed_and_tells_the_faults() -> None:
    hostile = changed(good(), RunStarted, {}, scenario='<&">')
    picture = ElementTree.fromstring(timeline(tuple(hostile)))
    titles = [title.text or "" for title in picture.iter(f"{SVG}title")]
    assert "term 1: c1" in titles
    assert "term 2: c2" in titles
    assert any(title.startswith("kill c1") for title in titles)
    assert '<&">, seed 1' in [text.text for text in picture.iter(f"{SVG}text")]
    for box in picture.iter(f"{SVG}rect"):
        assert float(box.get("width", "-1")) > 0
        assert float(box.get("height", "-1")) >= 0


def test_the_timeline_of_nothing_is_a_picture_too() -> None:
    ElementTree.fromstring(timeline(()))


PURE = [*Path(chaos.checkers.__file__).parent.glob("*.py"),
        *(Path(chaos.checkers.__file__).parents[1] / f"{name}.py"
          for name in ("generator", "nemesis", "timeline"))]  # fmt: skip


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_checkers_and_plans_are_pure(path: Path) -> None:
    """`random.Random(seed)` in the plans is a parameter, not a source of chance."""
    impure = {"os", "time", "socket", "subprocess", "threading", "asyncio", "pathlib", "secrets"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & impure
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in impure
