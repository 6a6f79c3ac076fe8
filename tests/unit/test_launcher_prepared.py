"""Which sandboxes are made ahead: shapes that come again, one at a time, within the size."""

from __future__ import annotations

from typing import Any, cast

from node_agent.launcher.child import Shape
from node_agent.launcher.jobs import Job
from node_agent.launcher.prepared import Prepared

_MESSAGE: dict[str, Any] = {
    "hostname": "job", "network": "none", "devices": [], "tmp_bytes": 1, "shm_bytes": 1,
    "work_bytes": 1, "tmp_inodes": 1, "work_inodes": 1, "io_read_bytes_per_s": 0,
    "io_write_bytes_per_s": 0, "cpus": [], "mems": [], "rootfs": "", "files": [],
}  # fmt: skip


class FakeJob:
    """What the pool asks of a sandbox."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.ended_by, self.failure = shape, "", None


def shape(tmp_bytes: int = 1) -> Shape:
    return Shape({**_MESSAGE, "tmp_bytes": tmp_bytes})


def fill(pool: Prepared) -> int:
    """As the launcher does, until nothing is missing; how many it made."""
    made = 0
    while (wanted := pool.missing()) is not None:
        pool.waiting.append(cast("Job", FakeJob(wanted[0])))
        made += 1
    return made


def test_a_shape_is_prepared_once_it_came_twice() -> None:
    pool = Prepared(4)
    assert pool.take(shape()) is None
    assert fill(pool) == 0, "one job alone may be the only one of its kind"
    assert pool.take(shape()) is None
    assert fill(pool) == 4
    first = pool.waiting[0]
    assert pool.take(shape()) is first
    assert pool.take(shape(2)) is None, "exactly the shape, or none"


def test_what_was_taken_is_made_again() -> None:
    pool = Prepared(4)
    made = []
    for _ in range(6):
        pool.take(shape())
        made.append(fill(pool))
    assert made == [0, 4, 1, 1, 1, 1]


def test_two_shapes_share_the_room() -> None:
    pool = Prepared(4)
    found = 0
    for index in range(40):
        found += pool.take(shape(index % 2)) is not None
        fill(pool)
        assert len(pool.waiting) - len(pool.surplus()) <= 4
    assert found > 30


def test_while_enough_wait_there_is_no_hurry_and_few_are_filled_up_at_once() -> None:
    pool = Prepared(8)
    hurried = []
    for _ in range(2):
        pool.take(shape())
    fill(pool)
    for _ in range(6):
        pool.take(shape())
        wanted = pool.missing()
        assert wanted is not None
        hurried.append(wanted[1])
    assert hurried == [False] * 5 + [True], "two of eight are few"
    pool.waiting.append(cast("Job", FakeJob(shape())))
    wanted = pool.missing()
    assert wanted is not None and wanted[1], "until all are there again"
    fill(pool)
    pool.take(shape())
    wanted = pool.missing()
    assert wanted is not None and not wanted[1]


def test_size_zero_prepares_nothing() -> None:
    pool = Prepared(0)
    for _ in range(5):
        assert pool.take(shape()) is None
        assert fill(pool) == 0


def test_what_is_beyond_the_size_goes_and_is_known_until_it_is_gone() -> None:
    pool = Prepared(2)
    pool.waiting = [cast("Job", FakeJob(shape(n))) for n in range(3)]
    (dropped,) = pool.surplus()
    assert dropped.shape.tmp_bytes == 0 and dropped in pool.alive
    pool.ended(dropped)
    assert len(pool.alive) == 2


def test_a_shape_that_cannot_be_prepared_is_not_tried_again_at_once() -> None:
    pool = Prepared(2)
    for _ in range(2):
        pool.take(shape())
    fill(pool)
    for job in list(pool.waiting):
        pool.ended(job)
    assert pool.missing() is None
    assert pool.take(shape()) is None and pool.missing() is None
    pool.take(shape())
    assert fill(pool) == 2
