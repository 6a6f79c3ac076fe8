"""State digests: leader and standby compare them, and a difference is loud and final."""

from msgspec.structs import replace

from controlplane.core import events as e
from controlplane.core.bounds import CLAIMS_MAX, DIGESTS_KEPT
from controlplane.core.divergence import DigestWatch
from controlplane.core.election import Election, Standing
from controlplane.core.membership import Member
from controlplane.core.silence import ElectionTiming
from idl.control import Beacon
from tests.unit.core_builders import Hand, seen, spec


def beacon(offset: int, digest: str, leader: str = "c2") -> Beacon:
    return Beacon(
        role="scheduler/main", term=1, leader=leader, incarnation=1, lease_ms=1_000,
        ledger_offset=offset, state_digest=digest,
    )  # fmt: skip


def test_the_same_place_is_compared_whoever_is_ahead() -> None:
    watch = DigestWatch()
    assert watch.applied(5, b"\x05") == "" and watch.applied(6, b"\x06") == ""
    assert watch.heard(beacon(5, "05"), 6) == ""
    assert "says ff" in watch.heard(beacon(5, "ff"), 6)
    assert watch.heard(beacon(8, "ff"), 6) == "", "not there yet"
    assert watch.applied(7, b"\x07") == ""
    difference = watch.applied(8, b"\x08")
    assert "at ledger offset 8 our state is 08 and c2 says ff" in difference


def test_what_cannot_be_compared_is_not() -> None:
    watch = DigestWatch()
    watch.applied(50, b"\x01")
    assert watch.heard(beacon(3, "ff"), 50) == "", "before the snapshot we started from"
    assert watch.heard(beacon(50, ""), 50) == "", "a leader that says nothing"
    watch.heard(beacon(51, "ff"), 50)
    assert watch.applied(52, b"\x02") == "" and watch.applied(53, b"\x03") == ""


def test_memory_is_bounded() -> None:
    watch = DigestWatch()
    for offset in range(DIGESTS_KEPT + 10):
        watch.applied(offset, b"\x01")
    for offset in range(CLAIMS_MAX + 10):
        watch.heard(beacon(10_000 + offset, "ff"), DIGESTS_KEPT + 10)
    assert len(watch._mine) == DIGESTS_KEPT and len(watch._claims) == CLAIMS_MAX


def test_a_standby_that_differs_says_so_once() -> None:
    leader = Hand()
    leader.node(seen())
    leader.submit(spec("a"))
    standby = Hand(lead=False)
    for _ in range(2):
        told = standby.step(e.StateClaimed(beacon=beacon(0, "")))
        assert told == () and not standby.core.diverged
    standby.core.name = leader.core.name
    same = beacon(leader.state.next_offset, leader.state.digest.hex())
    assert leader.step(e.StateClaimed(beacon=same)) == ()
    wrong = replace(same, state_digest="ff" * 16)
    (shown,) = (x for x in leader.step(e.StateClaimed(beacon=wrong)) if _shows(x))
    assert isinstance(shown, e.ShowDivergence) and leader.state.digest.hex() in shown.reason
    assert leader.core.diverged == shown.reason
    assert not [x for x in leader.step(e.StateClaimed(beacon=wrong)) if _shows(x)]


def _shows(effect: e.CoordinatorEffect) -> bool:
    return isinstance(effect, e.ShowDivergence)


def test_the_barred_vote_and_do_not_stand() -> None:
    members = tuple(Member(name=name) for name in ("c1", "c2", "c3"))
    timing = ElectionTiming(heartbeat_ms=100, timeout_ms=1_000)
    one = Election("scheduler/main", "c1", 1, members, timing, seed=1, now_ms=0)
    one.step(e.LedgerAdvanced(term=0, next_offset=3, digest="ab"), 0)
    one.step(e.Barred(reason="differs"), 1)
    for now in range(1_000, 20_000, 1_000):
        out = one.step(e.Tick(), now)
        assert not [x for x in out if isinstance(x, e.SendBallot)]
    assert one.standing is Standing.FOLLOWER
    assert one.next_wakeup_ms(20_000) > 20_000
