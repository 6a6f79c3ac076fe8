"""When an agent sends a status: at once at low load, in batches under load, never lost."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from node_agent.core.pace import STATUS_GAP_MS, STATUS_WAIT_MS, StatusPace


def test_a_start_is_told_at_once_and_what_nobody_waits_for_a_little_later() -> None:
    pace = StatusPace()
    assert pace.changed(1000, urgent=False) == 1000 + STATUS_WAIT_MS
    assert pace.changed(1005, urgent=True) == 1005, "brings the acceptance along"
    assert pace.changed(1005, urgent=False) is None, "planned already"
    pace.sent(1005)
    assert pace.changed(1500, urgent=True) == 1500


def test_under_load_news_wait_for_company() -> None:
    pace = StatusPace()
    pace.sent(1000)
    assert pace.changed(1001, urgent=True) == 1000 + STATUS_GAP_MS
    assert pace.changed(1002, urgent=True) is None
    assert pace.changed(1003, urgent=False) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=60))
def test_everything_is_told_in_time_and_never_twice_within_the_gap(
    steps: list[tuple[int, bool]],
) -> None:
    pace, now = StatusPace(), 1000
    planned: int | None = None
    untold: int | None = None
    sent: list[int] = []
    for wait, urgent in [*steps, (STATUS_WAIT_MS + STATUS_GAP_MS, True)]:
        now += wait
        if planned is not None and planned <= now:
            assert untold is not None
            assert planned - untold <= max(STATUS_WAIT_MS, STATUS_GAP_MS)
            sent.append(planned)
            pace.sent(planned)
            planned = untold = None
        due = pace.changed(now, urgent=urgent)
        planned = due if due is not None else planned
        untold = now if untold is None else untold
        assert planned is not None
    assert all(later - sooner >= STATUS_GAP_MS for sooner, later in pairwise(sent))
