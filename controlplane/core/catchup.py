"""Whether a coordinator is warm: it has read the ledger to where it ended when the process began.

A coordinator that stands for election before that would lead from an old state: it would have to
read everything in front of it while nobody decides.
"""


class CatchUp:
    """`applied`: next offset to read. `goal`: where the ledger ended; None until Kafka said so."""

    def __init__(self) -> None:
        self.applied = 0
        self.goal: int | None = None

    @property
    def done(self) -> bool:
        """Never before the goal is known, whatever was read meanwhile."""
        return self.goal is not None and self.applied >= self.goal
