"""Described machines for tests: as the agent reads them, and as a node that says so."""

from functools import cache

from idl import ledger as d
from idl.topology import Topology
from node_agent.topology.described import load_profile, read_described
from node_agent.topology.node import NodeTopology
from tests.unit.core_builders import ALL_LIMITS


@cache
def machine(profile: str) -> NodeTopology:
    """Read once per test run: a tree has thousands of files."""
    return read_described(load_profile(profile), profile)


def node_like(
    profile: str, node: str = "n1", incarnation: int = 1, parts: Topology | None = None
) -> d.NodeSeen:
    """A node that is this machine."""
    found = machine(profile)
    topology = found.parts if parts is None else parts
    return d.NodeSeen(
        node=node, incarnation=incarnation, enforces=(*ALL_LIMITS, "cpuset"),
        capacity=d.Capacity(
            cpu_millis=1000 * len(found.cpus), memory_bytes=found.memory_bytes,
            gpus=tuple(g.index for g in topology.gpus if not g.mig_mode and not g.unhealthy),
        ),
        topology=topology, simulated=True,
    )  # fmt: skip
