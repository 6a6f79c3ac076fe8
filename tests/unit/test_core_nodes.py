"""What a leader makes of nodes: silence, restarts, forgotten attempts, zombies. One rule a test."""

from controlplane.core import events as e
from idl import ledger as d
from idl.control import CancelIntent, ForgetIntent
from tests.unit.core_builders import RETRY_FAST, TIMING, Hand, names, seen, spec, with_running_job


def test_a_silent_node_is_lost_and_its_attempts_are_tried_elsewhere() -> None:
    hand = with_running_job(retry=RETRY_FAST)
    hand.pass_ms(TIMING.lost_ms - 500)
    hand.node(seen("n2"))
    assert "n1" not in hand.state.orphaning
    hand.pass_ms(500)
    assert hand.state.nodes["n1"].lost
    hand.pass_ms(200, 100)
    assert (hand.state.jobs["a"].node, hand.state.jobs["a"].attempt) == ("n2", 2)
    assert names(hand.result("a", attempt=1, node="n1")) == ["ResultRefused"]


def test_a_new_leader_counts_silence_from_its_own_start() -> None:
    hand = with_running_job()
    hand.step(e.RoleLost(reason="test"))
    hand.now += 60_000
    hand.step(e.RoleWon(term=2))
    hand.settle()
    hand.pass_ms(TIMING.lost_ms - 100)
    assert not hand.state.nodes["n1"].lost
    hand.pass_ms(500)
    assert hand.state.nodes["n1"].lost


def test_a_leader_that_slept_does_not_blame_its_nodes() -> None:
    hand = with_running_job()
    hand.now += 60_000
    hand.step(e.Tick())
    hand.settle()
    assert not hand.state.nodes["n1"].lost


def test_a_node_back_from_the_dead_is_told_to_end_what_is_not_current() -> None:
    hand = with_running_job(retry=RETRY_FAST)
    hand.node(seen("n2"))
    for _ in range(8):
        hand.pass_ms(500)
        hand.status("n2", ("a", 2, "running"))
    assert hand.state.jobs["a"].node == "n2"
    hand.out.clear()
    hand.node()
    assert not hand.state.nodes["n1"].lost
    hand.status("n1", ("a", 1, "running"))
    assert [(type(i), i.attempt) for i in hand.intents()] == [(CancelIntent, 1)]
    hand.status("n1", ("a", 1, "ended"))
    assert [(type(i), i.attempt) for i in hand.intents()] == [(ForgetIntent, 1)]


def test_an_attempt_given_up_holds_its_room_until_its_node_vacates_it() -> None:
    hand = with_running_job(cpu=2_000, retry=RETRY_FAST)
    hand.pass_ms(TIMING.lost_ms, 250)
    hand.node(seen("n2"))
    hand.pass_ms(500, 100)
    hand.status("n2", ("a", 2, "running"))
    hand.node()
    hand.submit(spec("b", cpu=2_000))
    hand.status("n1", ("a", 1, "running"))
    assert hand.state.nodes["n1"].free_cpu_millis == 0
    assert hand.state.jobs["b"].node == "", "it would be refused by the node"
    decisions = hand.status("n1", ("a", 1, "ended"))
    assert names(decisions)[:1] == ["Vacated"]
    assert hand.state.jobs["b"].node == "n1"
    hand.state.check_invariants()


def test_a_new_incarnation_holds_nothing_that_was_given_up() -> None:
    hand = with_running_job(cpu=2_000, retry=RETRY_FAST)
    hand.pass_ms(TIMING.lost_ms, 250)
    hand.node(seen(incarnation=2))
    assert hand.state.nodes["n1"].given_up == {}
    assert hand.state.nodes["n1"].free_cpu_millis == 2_000 * (hand.state.jobs["a"].node == "")


def test_a_restarted_agent_gives_up_what_it_does_not_list() -> None:
    hand = with_running_job(retry=RETRY_FAST)
    hand.node(seen(incarnation=2))
    decisions: list[d.Decision] = []
    for _ in range(6):
        hand.pass_ms(500)
        decisions += hand.status("n1", incarnation=2)
    released = [x for x in decisions if isinstance(x, d.Released)]
    assert [(x.outcome, x.attempt) for x in released] == [("node_lost", 1)]


def test_a_restarted_agent_keeps_what_it_lists() -> None:
    hand = with_running_job()
    hand.node(seen(incarnation=2))
    for _ in range(20):
        hand.pass_ms(500)
        hand.status("n1", ("a", 1, "running"), incarnation=2)
    assert hand.state.jobs["a"].attempt == 1
    assert names(hand.result("a")) == ["Released", "Finished"]


def test_an_attempt_that_its_node_forgot_is_released() -> None:
    hand = with_running_job(retry=RETRY_FAST)
    decisions: list[d.Decision] = []
    for round_ in range(12):
        hand.pass_ms(500)
        decisions += hand.status("n1", *((("a", 1, "running"),) if round_ == 0 else ()))
        if decisions:
            break
    (released,) = [x for x in decisions if isinstance(x, d.Released)]
    assert (released.outcome, released.detail) == ("platform", "node forgot attempt")


def test_an_attempt_that_its_node_never_takes_is_released_in_the_end() -> None:
    hand = Hand()
    hand.node()
    hand.submit(spec("a"))
    decisions: list[d.Decision] = []
    for _ in range(121):
        hand.pass_ms(500)
        decisions += hand.status("n1")
    (released,) = [x for x in decisions if isinstance(x, d.Released)]
    assert (released.outcome, released.detail) == ("platform", "node never took the attempt")


def test_an_end_whose_result_never_comes_is_released_in_the_end() -> None:
    hand = with_running_job(retry=RETRY_FAST)
    decisions: list[d.Decision] = []
    for _ in range(402):
        hand.pass_ms(1_500)
        decisions += hand.status("n1", ("a", 1, "ended"))
    (released,) = [x for x in decisions if isinstance(x, d.Released)]
    assert (released.outcome, released.detail) == (
        "platform", "attempt ended and its result never came",
    )  # fmt: skip


def test_a_partial_status_says_nothing_about_what_it_leaves_out() -> None:
    hand = with_running_job()
    for _ in range(20):
        hand.pass_ms(500)
        hand.status("n1", full=False)
    assert hand.state.jobs["a"].attempt == 1


def test_an_older_incarnation_is_not_believed_while_the_newer_speaks() -> None:
    hand = Hand()
    hand.node(seen(incarnation=5))
    assert hand.node(seen(incarnation=4, cpu=64_000)) == []
    assert hand.state.nodes["n1"].incarnation == 5


def test_a_process_older_than_the_ledgers_does_not_speak_for_its_node() -> None:
    """Its state directory is a new one and its clock was set back, and so was everybody's memory:
    the coordinators were restarted, too. The node is lost once, then taken as what it is now."""
    before = Hand()
    before.node(seen(incarnation=100))
    before.submit(spec("a", retry=RETRY_FAST))
    before.status("n1", ("a", 1, "running"), incarnation=100)
    hand = Hand(lead=False)
    hand.core.adopt(before.state)
    hand.offset, hand.now, hand.read = before.offset, before.now + 1_000, dict(before.read)
    hand.step(e.RoleWon(term=2))
    hand.settle()
    told: list[d.Decision] = []
    for _ in range(40):
        told += hand.node(seen(incarnation=50))
        told += hand.status("n1", incarnation=50)
        hand.pass_ms(1_000)
    node = hand.state.nodes["n1"]
    assert (node.incarnation, node.lost) == (50, False)
    assert hand.state.jobs["a"].attempt == 2
