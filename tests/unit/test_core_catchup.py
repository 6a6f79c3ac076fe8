"""A coordinator is warm only once it has read to an end that it knows."""

from controlplane.core.catchup import CatchUp


def test_what_is_read_before_the_end_is_known_does_not_count_as_all() -> None:
    """Found by benchmarks/failover.py: restarted coordinators stood for election after their first
    batch, were elected cold, and read the rest of the ledger while nobody decided."""
    found = CatchUp()
    found.applied = 500
    assert not found.done
    found.goal = 2_000
    assert not found.done
    found.applied = 2_000
    assert found.done


def test_an_empty_ledger_is_read_at_once() -> None:
    found = CatchUp()
    found.goal = 0
    assert found.done
