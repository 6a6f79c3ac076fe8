"""The election when Kafka stalls, for all or for the leader alone (ADR 0012)."""

import itertools

import pytest

from controlplane.core import events as e
from controlplane.core.reach import CUT_MS, HOLD_MS
from tests.unit.election_net import Net


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_leader_that_alone_does_not_reach_kafka_hands_over(size: int) -> None:
    net = Net(size).run(2_000 + HOLD_MS)
    net.stall("c1")
    net.run(CUT_MS - 100)
    assert net.leaders == ["c1"]
    net.run(1_000)
    assert net.leaders == ["c2"]
    assert net.lost == [("c1", "it alone cannot reach Kafka")]
    net.run(30_000)
    assert net.leaders == ["c2"] and len(net.won) == 2, "the one cut off stays quiet"


@pytest.mark.parametrize("reaching", [(), ("c3",)])
def test_a_kafka_that_stalls_for_all_or_most_moves_nothing(reaching: tuple[str, ...]) -> None:
    net = Net(5).run(2_000 + HOLD_MS)
    net.stall(*(f"c{n}" for n in range(1, 6) if f"c{n}" not in reaching))
    net.run(60_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_clients_that_find_a_broker_again_at_different_times_move_nothing() -> None:
    net = Net(3).run(2_000 + HOLD_MS)
    net.stall("c1", "c2", "c3")
    net.run(9_000)
    net.cut_off = {"c1"}
    net.run(1_400)
    net.stall()
    net.run(10_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_an_append_that_fails_where_the_broker_answers_moves_nothing() -> None:
    """Too few replicas in sync, say: no other could append either."""
    net = Net(3).run(2_000 + HOLD_MS)
    net.step("c1", e.KafkaShown(stalled=True))
    net.run(60_000)
    assert net.leaders == ["c1"] and len(net.won) == 1


def test_nobody_is_asked_while_there_is_no_doubt() -> None:
    net = Net(3).run(60_000)
    assert net.probes == []
    net.stall("c1", "c2", "c3")
    net.run(10_000)
    assert set(net.probes) == {"c1", "c2", "c3"} and len(net.probes) < 3 * 22
    net.stall()
    net.run(1_000)
    net.probes.clear()
    net.run(10_000)
    assert net.probes == []


def test_a_new_leader_keeps_the_role_for_a_while_whatever_it_reaches() -> None:
    """Cut off in turns, they do not pass the role on faster than that."""
    net = Net(3).run(2_000)
    for _ in range(60):
        net.stall(*net.leaders)
        net.run(1_000)
    gaps = [after - before for (before, *_), (after, *_) in itertools.pairwise(net.won)]
    assert len(gaps) >= 4 and min(gaps) >= HOLD_MS


def test_one_that_is_cut_off_stands_last() -> None:
    net = Net(3).run(2_000 + HOLD_MS)
    net.stall("c1", "c2")
    net.run(1_000)
    net.kill("c1", hint=True)
    net.run(200)
    assert net.leaders == ["c3"], "c2 is before it in rank, and does not reach Kafka"
    net = Net(3).run(2_000 + HOLD_MS)
    net.stall("c1", "c2", "c3")
    net.run(1_000)
    net.kill("c1", hint=True)
    net.run(200)
    assert net.leaders, "where nobody does, somebody leads all the same"
