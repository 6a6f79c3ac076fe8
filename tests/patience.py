"""How much longer everything takes here than on a machine of its own: once, in an emulated guest.

Only deadlines against hangs, and times that a job's or a node's silence may last, are stretched;
what a test asserts stays what it is.
"""

import os
from typing import Final

VARIABLE: Final = "OUTRIDER_TEST_PATIENCE"
"""A factor; `tests.vm` sets it."""
FACTOR: Final = int(os.environ.get(VARIABLE, "1"))


def patient(value: int) -> int:
    """That many seconds (or milliseconds) of a quick machine, in those of this one."""
    return value * FACTOR
