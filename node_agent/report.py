"""The node's report: what it offers, what it can and cannot enforce, what it is made of."""

import os
from pathlib import Path
from typing import Final

import msgspec

from idl.control import NodeReport
from idl.ids import Incarnation
from idl.jobs import LimitName
from idl.ledger import Capacity
from idl.units import MIB
from node_agent.sandbox.plan import Enforcement, Limit

RESERVED_MEMORY_BYTES: Final = 512 * MIB
"""Left to the agent and the system where nobody says what to offer."""
_LIMITS: Final[tuple[LimitName, ...]] = (
    "memory", "pids", "cpu", "network", "filesystem", "seccomp", "disk", "wall_time",
)  # fmt: skip


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator lets this node offer; 0: what the machine has."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    labels: dict[str, str] = {}


def memory_total_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemTotal of proc(5)."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return 0


def build_report(
    pool: str, node: str, incarnation: Incarnation, offer: Offer, enforcement: Enforcement
) -> NodeReport:
    """The report of this machine."""
    memory = offer.memory_bytes or max(MIB, memory_total_bytes() - RESERVED_MEMORY_BYTES)
    capacity = Capacity(
        cpu_millis=offer.cpu_millis or 1000 * len(os.sched_getaffinity(0)), memory_bytes=memory
    )
    return NodeReport(
        pool=pool,
        node=node,
        incarnation=incarnation,
        capacity=capacity,
        enforces=tuple(name for name in _LIMITS if Limit(name) in enforcement.enforced),
        missing={limit.value: why for limit, why in enforcement.missing.items()},
        sandbox=f"native, {enforcement.mode}, cgroup {enforcement.cgroup}",
        labels=offer.labels,
    )
