"""What may name a job, queue, node, pool or coordinator."""

import pytest

from idl.ids import is_valid_name


@pytest.mark.parametrize("name", ["a", "7", "report-17", "a.b_c", "a" * 128])
def test_names(name: str) -> None:
    assert is_valid_name(name)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a\n", "a\nb", "é", "a" * 129])
def test_no_names(name: str) -> None:
    assert not is_valid_name(name)
