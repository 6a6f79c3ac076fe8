"""When gathered topics are read: the first sample at once, the next ones together, none lost."""

from hypothesis import given
from hypothesis import strategies as st

from idl.dds.gathering import GATHER_S, Gathering

REST_S = 1.0


class Attached:
    """A wait set that knows what may wake it."""

    def __init__(self) -> None:
        self.conditions: list[str] = []

    def attach(self, entity: str) -> None:
        assert entity not in self.conditions
        self.conditions.append(entity)

    def detach(self, entity: str) -> None:
        self.conditions.remove(entity)


def test_the_first_sample_wakes_the_next_wait_and_after_a_rest_one_wakes_again() -> None:
    waker = Attached()
    gathering = Gathering(waker, ["status", "report"])
    assert waker.conditions == ["status", "report"]
    assert gathering.wait_s(10.0, REST_S) == REST_S
    assert gathering.due(10.0)
    gathering.was_read(some=True, now=10.0)
    assert waker.conditions == [], "what comes now waits for company"
    assert not gathering.due(10.0 + GATHER_S / 2)
    assert 0 < gathering.wait_s(10.0 + GATHER_S / 2, REST_S) <= GATHER_S
    later = 10.0 + 2 * GATHER_S
    assert gathering.wait_s(later, REST_S) == 0
    assert gathering.due(later)
    gathering.was_read(some=True, now=later)
    assert waker.conditions == [], "more came: again together"
    gathering.was_read(some=False, now=later + GATHER_S)
    assert waker.conditions == ["status", "report"], "at rest, one sample wakes"
    assert gathering.wait_s(later + GATHER_S, REST_S) == REST_S


@given(st.lists(st.booleans(), max_size=40))
def test_conditions_wake_exactly_while_no_time_is_set(reads: list[bool]) -> None:
    waker, now = Attached(), 1.0
    gathering = Gathering(waker, ["status"])
    for some in reads:
        now += gathering.wait_s(now, REST_S)
        assert gathering.due(now), "never waited for longer than it says"
        gathering.was_read(some, now)
        asleep = gathering.wait_s(now, REST_S) == REST_S
        assert asleep == (waker.conditions == ["status"]) == (not some)
