"""What the simulator found in the real cores: each bug in its smallest form."""

from idl.control import AssignIntent
from tests.unit import core_builders as build


def test_a_node_that_comes_back_before_its_attempts_are_given_up_is_told_again() -> None:
    """Seed 389 of the first simulator: `NodeLost` was recorded and the node was heard again before
    its attempts were released. The book of intents had dropped them: an assignment hung until the
    node was found to have never taken it (a minute), a cancellation was never sent at all."""
    hand = build.Hand()
    hand.node()
    hand.submit(build.spec("a"))
    assert [type(item) for item in hand.intents()] == [AssignIntent]  # and it got lost
    state, book = hand.state, hand.core._book
    node = state.nodes["n1"]
    node.lost = True
    assert not book.collect(state, "main", 1, "c1", hand.now + 1_000)
    node.lost = False
    intents = book.collect(state, "main", 1, "c1", hand.now + 2_000)
    assert [item.job for intent in intents for item in intent.items] == ["a"]


def test_what_was_released_is_not_told_again() -> None:
    hand = build.Hand()
    hand.node()
    hand.submit(build.spec("a"))
    hand.intents()
    hand.result("a", 1, "succeeded")
    book = hand.core._book
    book.tell("a")  # as a late fact would
    assert not book.collect(hand.state, "main", 1, "c1", hand.now + 1_000)
    assert book.next_due_ms is None
