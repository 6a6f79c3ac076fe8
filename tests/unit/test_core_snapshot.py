"""Snapshots, pure: any history cut anywhere gives the same state, digest and decisions after."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from chaos.sim.life import live
from dataplane import snapshots
from dataplane.core.snapshot import image_of, restored
from dataplane.core.state import PoolState
from dataplane.snapshots import checksum_of, decode_head, pack, unpack
from idl import ledger as d
from idl.codec import decode_entry, encode
from idl.errors import SnapshotRefusedError
from idl.ids import PoolName
from idl.snapshots import SnapshotHead
from tests.unit.core_builders import Story, seen, spec


def head_for(state: PoolState, parts: tuple[bytes, ...], size: int) -> SnapshotHead:
    return SnapshotHead(
        pool=PoolName("main"), slot=0, next_offset=state.next_offset, at_ms=0,
        state_hash=state.state_hash(), digest=state.digest.hex(), last_entry="",
        checksum=checksum_of(*parts), image_bytes=size, parts=tuple(range(len(parts))),
    )  # fmt: skip


def through_bytes(state: PoolState) -> PoolState:
    size, parts = pack(state)
    return unpack(head_for(state, parts, size), list(parts))


def busy() -> Story:
    """A bit of everything: running, backing off, dead, lost and draining nodes, deadlines."""
    story = Story().add(seen(gpus=(0, 1), images={"a": "sha256:1"}), seen("n2"), seen("n3"))
    story.ingest(
        spec("run", gpus=1), spec("retry"), spec("late", start_within_ms=500), spec("dead"),
        spec("orphan"),
    )  # fmt: skip
    story.assign("run", gpus=(1,)).start("run").assign("retry", "n2")
    retry = d.RetryScheduled(job="retry", attempt=2, reason="failed", not_before_ms=9_000)
    story.release("retry", retry, "failed").assign("orphan", "n3")
    story.add(d.NodeLost(node="n3", incarnation=1, reason="silent"))
    story.add(d.DeadLettered(job="dead", code="NotRetried", reason="why"))
    return story.add(d.Waiting(job="late", code="NoNodes", message="none"))


def test_what_a_state_says_survives_and_the_indices_are_built_again() -> None:
    state = busy().state
    again = through_bytes(state)
    again.check_invariants()
    assert again.state_hash() == state.state_hash() and again.digest == state.digest
    assert image_of(again) == image_of(state)
    assert again.wake(8_999) == 0 and again.wake(9_000) == 1 and "retry" in again.pending
    assert [job.id for job in again.overdue(state.at_ms + 10_000)] == ["late"]
    assert list(again.orphaning) == ["n3"] and again.nodes["n1"].free_gpus == (0,)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=12, deadline=None)
def test_any_history_cut_anywhere_goes_on_as_if_it_had_not_been_cut(seed: int, cut: float) -> None:
    history = [decode_entry(i, value) for i, value in enumerate(live(seed, keep_story=True).ledger)]
    at = int(cut * len(history))
    whole = PoolState()
    for offset, entry in enumerate(history[:at]):
        whole.apply(offset, entry)
    again = through_bytes(whole) if at else restored(image_of(whole))
    for offset, entry in enumerate(history[at:], at):
        assert whole.apply(offset, entry) == again.apply(offset, entry)
        assert whole.digest == again.digest
    again.check_invariants()
    assert image_of(whole) == image_of(again) and whole.state_hash() == again.state_hash()


def test_the_digest_tells_folds_apart_and_void_entries_leave_it_alone() -> None:
    one, other = busy(), busy()
    assert one.state.digest == other.state.digest
    other.ingest(spec("x"))
    assert one.state.digest != other.state.digest
    before = one.state.digest
    late = d.LedgerEntry(
        term=0, leader="old", incarnation=9, seq=4, at_ms=0, decisions=(d.Cancelled(job="a"),)
    )
    one.state.apply(99, late)
    assert one.state.digest == before


def refusals() -> dict[str, tuple[SnapshotHead, list[bytes]]]:
    state = busy().state
    size, parts = pack(state)
    good = head_for(state, parts, size)
    broken = [part[:-1] + bytes([part[-1] ^ 1]) for part in parts]
    garbage = [b"no zlib"]

    def but(**changes: object) -> SnapshotHead:
        return replace(good, **changes)

    return {
        "checksum": (good, broken),
        "cannot be read": (but(checksum=checksum_of(*garbage)), garbage),
        "bytes are no image": (but(image_bytes=0), list(parts)),
        "restores to": (but(state_hash="0" * 32), list(parts)),
    }


@pytest.mark.parametrize("why", refusals())
def test_a_snapshot_that_is_not_what_it_promises_is_refused(why: str) -> None:
    head, parts = refusals()[why]
    with pytest.raises(SnapshotRefusedError, match=why):
        unpack(head, parts)


def test_unknown_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = busy().state
    size, parts = pack(state)
    head = head_for(state, parts, size)
    with pytest.raises(SnapshotRefusedError, match="version 9"):
        decode_head(3, encode(replace(head, v=9)))
    with pytest.raises(SnapshotRefusedError, match="cannot be read"):
        decode_head(3, b"\x00garbage")
    monkeypatch.setattr(snapshots, "IMAGE_VERSION", 99)
    with pytest.raises(SnapshotRefusedError, match="known is 99"):
        unpack(head, list(parts))
