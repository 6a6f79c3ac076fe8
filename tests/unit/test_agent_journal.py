"""The journal: any prefix recovers a consistent state, compaction changes nothing, and the table of
what a restarted agent does about each attempt."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from idl.control import AssignIntent
from idl.errors import PlatformFaultError
from idl.jobs import JobSpec
from idl.ledger import Capacity
from node_agent.core.attempts import AgentCore, Phase, RefuseAttempt, RunAttempt
from node_agent.core.journal import (
    Accepted,
    Delivered,
    Ended,
    Entry,
    Forgotten,
    JournalState,
    Launching,
    Opened,
    Origin,
    Read,
    Record,
    Started,
    TermSeen,
    fold,
    frame,
    frames,
    read,
    take_over,
)
from node_agent.core.recovery import AdoptAttempt, DeliverAgain, recover
from node_agent.journal import Journal
from node_agent.room import Room
from node_agent.sandbox.plan import SandboxOutcome

OPENED = Opened(scope="c/main", node="n1", boot_id="b1", incarnation=42)
ORIGIN = Origin("c/main", "n1", "b1", 1_000)
JOBS = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(1, 2)


def assign(job: str = "a", attempt: int = 1) -> AssignIntent:
    return AssignIntent(
        job=job, attempt=attempt, queue="default", spec=JobSpec(id=job, command=("x",))
    )


def ended(job: str = "a", attempt: int = 1, result: bytes | None = None) -> Ended:
    outcome = SandboxOutcome(cause="exited", exit_code=3, result=result)
    return Ended(job=job, attempt=attempt, at_ms=9, outcome=outcome)


RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(lambda j, n: Accepted(assign=assign(j, n), term=2, at_ms=5), JOBS, NUMBERS),
    st.builds(lambda j, n: Launching(job=j, attempt=n), JOBS, NUMBERS),
    st.builds(lambda j, n: Started(job=j, attempt=n, at_ms=7), JOBS, NUMBERS),
    st.builds(ended, JOBS, NUMBERS, st.sampled_from([None, b"", b"\0\xff" * 50])),
    st.builds(lambda j, n: Delivered(job=j, attempt=n), JOBS, NUMBERS),
    st.builds(lambda j, n: Forgotten(job=j, attempt=n), JOBS, NUMBERS),
    st.builds(lambda n: TermSeen(term=n), st.integers(1, 9)),
)
HISTORIES = st.lists(RECORDS, max_size=25).map(lambda records: [OPENED, *records])


def view(state: JournalState) -> tuple[object, ...]:
    return (state.opened, state.term, state.entries)


@given(HISTORIES, st.data())
def test_any_prefix_of_the_file_says_what_its_whole_records_say(
    history: list[Record], data: st.DataObject
) -> None:
    whole = frames(history)
    cut = data.draw(st.integers(0, len(whole)))
    found = read(whole[:cut])
    assert not found.damaged, "a writer that was killed damages nothing"
    assert list(found.records) == history[: len(found.records)]
    assert found.good_bytes == len(frames(found.records)) <= cut
    ends = [len(frames(history[:n])) for n in range(len(history) + 1)]
    assert len(found.records) == sum(end <= cut for end in ends) - 1


@given(HISTORIES)
def test_a_compacted_journal_says_the_same(history: list[Record]) -> None:
    state = fold(history)
    again = fold(read(frames(state.records())).records)
    assert view(again) == view(state)
    assert len(list(state.records())) <= 2 + 3 * len(state.entries)


@given(HISTORIES, st.data())
def test_going_on_after_a_compaction_changes_nothing(
    history: list[Record], data: st.DataObject
) -> None:
    at = data.draw(st.integers(1, len(history)))
    compacted = fold(fold(history[:at]).records())
    for record in history[at:]:
        compacted.apply(record)
    assert view(compacted) == view(fold(history))


@given(HISTORIES, st.data())
def test_damage_is_seen_and_nothing_after_it_is_believed(
    history: list[Record], data: st.DataObject
) -> None:
    whole = bytearray(frames(history))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    found = read(bytes(whole))
    assert found.good_bytes <= at
    assert list(found.records) == history[: len(found.records)]


def test_a_hole_of_zeros_is_damage() -> None:
    assert read(frame(OPENED) + bytes(64)) == Read((OPENED,), len(frame(OPENED)), damaged=True)


@pytest.mark.parametrize(
    ("found", "same"),
    [
        (Read((), 0, damaged=False), False),
        (Read((OPENED,), 1, damaged=False), True),
        (Read((OPENED,), 1, damaged=True), False),
        (Read((replace(OPENED, boot_id="b0"),), 1, damaged=False), False),
        (Read((replace(OPENED, v=99),), 1, damaged=False), False),
        (Read((replace(OPENED, node="n2"),), 1, damaged=False), False),
        (Read((replace(OPENED, scope="other"),), 1, damaged=False), False),
    ],
)
def test_only_a_whole_journal_of_this_boot_keeps_the_incarnation(found: Read, same: bool) -> None:
    state, kept = take_over(found, ORIGIN)
    assert kept is same and state.opened is not None
    assert (state.opened.incarnation == 42) is same
    assert (state.opened.scope, state.opened.boot_id) == ("c/main", "b1")


def test_a_new_boot_keeps_only_results_that_wait_and_counts_on() -> None:
    history: list[Record] = [
        replace(OPENED, boot_id="b0", incarnation=5_000),
        Accepted(assign=assign("a"), term=3, at_ms=1),
        Accepted(assign=assign("b"), term=3, at_ms=1),
        ended("b"),
        Delivered(job="c", attempt=1),
    ]
    state, kept = take_over(Read(tuple(history), 1, damaged=False), ORIGIN)
    assert not kept and list(state.entries) == [("b", 1)]
    assert state.opened is not None
    assert state.opened.incarnation == 5_001, "also where the clock went back"


ACCEPTED = Entry(assign=assign(), term=2, accepted_ms=5)
LAUNCHING = replace(ACCEPTED, launching=True)
STARTED = replace(LAUNCHING, started_ms=7)
ENDED = replace(STARTED, ended=ended())
GONE = RefuseAttempt
RECOVERIES = [
    # entry, launcher has it, same launcher → phase, effect
    (Entry(), False, True, Phase.ENDED, None),
    (ENDED, False, True, Phase.REPORTING, DeliverAgain),
    (ENDED, True, True, Phase.REPORTING, DeliverAgain),
    (STARTED, True, True, Phase.RUNNING, AdoptAttempt),
    (LAUNCHING, True, True, Phase.ACCEPTED, AdoptAttempt),
    (ACCEPTED, False, True, Phase.ACCEPTED, RunAttempt),
    (ACCEPTED, False, False, Phase.ACCEPTED, RunAttempt),
    (LAUNCHING, False, True, Phase.ACCEPTED, RunAttempt),
    (LAUNCHING, False, False, Phase.ACCEPTED, RefuseAttempt),
    (STARTED, False, False, Phase.RUNNING, RefuseAttempt),
    (STARTED, False, True, Phase.RUNNING, RefuseAttempt),
]


@pytest.mark.parametrize(("entry", "held", "same", "phase", "effect"), RECOVERIES)
def test_what_a_restarted_agent_does(
    entry: Entry, held: bool, same: bool, phase: Phase, effect: type | None
) -> None:
    state = JournalState()
    state.entries[("a", 1)] = entry
    found = recover(state, ["a.1"] if held else [], same)
    assert found.restored[("a", 1)].phase is phase
    assert [type(e) for e in found.effects] == ([effect] if effect else [])
    assert found.unknown == (("a.1",) if held and entry.ended is not None else ())


def test_jobs_that_nobody_accepted_are_killed() -> None:
    assert recover(JournalState(), ["x.1", "b.2"], True).unknown == ("b.2", "x.1")


@given(HISTORIES, st.booleans())
@settings(max_examples=50)
def test_a_restored_core_holds_its_invariants(history: list[Record], same: bool) -> None:
    state = fold(history)
    held = [f"{job}.{n}" for (job, n), e in state.entries.items() if e.launching and not e.ended]
    recovery = recover(state, held, same)
    agent = AgentCore(
        "main", "n1", 42, Capacity(cpu_millis=8000, memory_bytes=1 << 34), frozenset()
    )
    agent.restore(recovery.restored, state.term)
    agent.check_invariants()
    assert agent.term == state.term
    live = {(a.job, a.attempt) for a in agent.live}
    assert live == {k for k, e in state.entries.items() if e.assign and not e.ended}


# --- the file -------------------------------------------------------------------------------------


def test_a_reopened_journal_goes_on(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal", ORIGIN)
    assert not first.same_incarnation and first.incarnation == 1_000
    for record in (
        Accepted(assign=assign(), term=3, at_ms=1),
        TermSeen(term=4),
        ended(result=b"r"),
    ):
        first.append(record)
    size = first.size_bytes
    assert (tmp_path / "journal").stat().st_size == size
    with (tmp_path / "journal").open("ab") as file:
        file.write(frame(Delivered(job="a", attempt=1))[:-1])  # killed in the middle of a write
    second = Journal(tmp_path / "journal", ORIGIN._replace(now_ns=9_999))
    assert second.same_incarnation and second.incarnation == 1_000
    assert view(second.state) == view(first.state)
    assert second.state.term == 4
    second.append(Delivered(job="a", attempt=1))
    assert fold(read((tmp_path / "journal").read_bytes()).records).entries[("a", 1)].delivered
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600


def test_it_is_rewritten_before_it_grows_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node_agent.journal.COMPACT_BYTES_MIN", 4_096)
    journal = Journal(tmp_path / "journal", ORIGIN)
    most = 0
    for number in range(1, 400):
        for record in (
            Accepted(assign=assign("a", number), term=1, at_ms=1),
            ended("a", number, b"x" * 500),
            Delivered(job="a", attempt=number),
            Forgotten(job="a", attempt=number),
        ):
            journal.append(record)
            most = max(most, journal.size_bytes)
    assert most < 4_096 + 2_000
    assert journal.state.entries == {}


def breaking(monkeypatch: pytest.MonkeyPatch, number: int, room: int = 0) -> None:
    """write(2) takes `room` bytes, then fails."""
    left, write = [room], os.write

    def limited(fd: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(number, os.strerror(number))
        taken = write(fd, data[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr("node_agent.journal.os.write", limited)


def test_a_disk_that_fails_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", ORIGIN)
    breaking(monkeypatch, errno.EIO)
    with pytest.raises(PlatformFaultError, match=r"Input/output error.*--state-dir"):
        journal.append(TermSeen(term=2))


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """What was written stays whole, what was not is in memory, and both are there afterwards."""
    path = tmp_path / "journal"
    journal = Journal(path, ORIGIN)
    assert journal.append(Accepted(assign=assign(), term=2, at_ms=5))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        breaking(patch, errno.ENOSPC, room)
        assert not journal.append(Launching(job="a", attempt=1))
        assert not journal.catch_up()
        assert not journal.append(ended())
    assert path.read_bytes() == before, "no torn record, and no half of a copy"
    assert list(tmp_path.iterdir()) == [path]
    assert not journal.append(TermSeen(term=9)), "the order of records is kept"
    assert journal.catch_up()
    assert journal.append(Delivered(job="a", attempt=1))
    assert view(fold(read(path.read_bytes()).records)) == view(journal.state)
    assert journal.state.entries["a", 1].delivered and journal.state.term == 9


def test_a_full_disk_lets_the_next_process_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    first = Journal(path, ORIGIN)
    first.append(Accepted(assign=assign(), term=2, at_ms=5))
    first.close()
    with monkeypatch.context() as patch:
        breaking(patch, errno.ENOSPC, room=10)
        second = Journal(path, ORIGIN)
    assert second.behind and second.same_incarnation and ("a", 1) in second.state.entries
    assert second.catch_up() and second.append(Launching(job="a", attempt=1))
    assert fold(read(path.read_bytes()).records).entries["a", 1].launching


def test_a_journal_that_is_behind_closes_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, journal = Room(tmp_path), Journal(tmp_path / "journal", ORIGIN)
    assert room.look(journal) == "" and room.free_bytes > 0
    with monkeypatch.context() as patch:
        breaking(patch, errno.ENOSPC)
        journal.append(TermSeen(term=2))
        assert "full" in room.look(journal)
    assert room.look(journal) == "" and not journal.behind
