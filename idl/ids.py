"""Identifiers. Each is a `NewType`, so that mypy tells a term from an attempt number."""

import re
from typing import Final, NewType

JobId = NewType("JobId", str)
QueueName = NewType("QueueName", str)
NodeId = NewType("NodeId", str)
CoordinatorId = NewType("CoordinatorId", str)
PoolName = NewType("PoolName", str)
RoleName = NewType("RoleName", str)
Term = NewType("Term", int)
Attempt = NewType("Attempt", int)
"""Attempt number of a job, from 1; it is the fencing token of its results (DESIGN, idea 6)."""
Incarnation = NewType("Incarnation", int)
"""Start time of a process in ns since the epoch: tells a restarted process from its former self."""

NAME_PATTERN: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
"""Job, queue, node names: Kafka's topic alphabet, at most 128, so that a name is valid anywhere."""


def scheduler_role(pool: PoolName) -> RoleName:
    """The role whose holder schedules `pool`."""
    return RoleName(f"scheduler/{pool}")


def is_valid_name(name: str) -> bool:
    """True where `name` may name a job, queue, node, pool or coordinator."""
    return NAME_PATTERN.fullmatch(name) is not None  # `$` alone lets a newline follow
