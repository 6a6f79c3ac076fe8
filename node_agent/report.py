"""The node's report: what it offers, what it can and cannot enforce, what it is made of."""

from pathlib import Path
from typing import Final, get_args

import msgspec

from idl.control import GpuReport, NodeReport, NumaReport
from idl.ids import Incarnation
from idl.jobs import LimitName
from idl.ledger import Capacity
from idl.units import MIB
from node_agent.core.gpus import CONTROL_DEVICES, GpuDevices
from node_agent.sandbox.plan import Enforcement, Limit
from node_agent.topology.cpu import format_cpu_list
from node_agent.topology.node import NodeTopology

RESERVED_MEMORY_BYTES: Final = 512 * MIB
"""Left to the agent and the system where nobody says what to offer."""
_LIMITS: Final[tuple[LimitName, ...]] = get_args(LimitName)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator lets this node offer; 0: what the machine has."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    labels: dict[str, str] = {}


def gpu_devices(topology: NodeTopology) -> GpuDevices:
    """The device nodes of the GPUs that have one here (a container may be given fewer)."""
    found = {
        gpu.index: (f"/dev/nvidia{gpu.minor}", gpu.uuid)
        for gpu in topology.gpus
        if gpu.minor is not None and Path(f"/dev/nvidia{gpu.minor}").exists()
    }
    return GpuDevices(found, (path for path in CONTROL_DEVICES if Path(path).exists()))


def build_report(
    pool: str,
    node: str,
    incarnation: Incarnation,
    offer: Offer,
    enforcement: Enforcement,
    topology: NodeTopology,
) -> NodeReport:
    """The report of this machine: what is offered, never more CPUs and memory than asked for."""
    memory = offer.memory_bytes or max(MIB, topology.memory_bytes - RESERVED_MEMORY_BYTES)
    capacity = Capacity(
        cpu_millis=offer.cpu_millis or 1000 * len(topology.cpus),
        memory_bytes=memory,
        gpus=tuple(gpu.index for gpu in topology.gpus),
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
        numa=tuple(
            NumaReport(
                id=domain.id,
                cpus=format_cpu_list(domain.cpus),
                memory_bytes=domain.memory_bytes,
                distances=domain.distances,
            )
            for domain in topology.numa
        ),
        gpus=tuple(
            GpuReport(
                index=gpu.index,
                uuid=gpu.uuid,
                product_name=gpu.product_name,
                memory_bytes=gpu.memory_bytes,
                numa_node=-1 if gpu.numa_node is None else gpu.numa_node,
                pcie_bus_id=gpu.pcie_bus_id,
            )
            for gpu in topology.gpus
        ),
        nvlinks=topology.nvlinks,
        gpu_note=topology.gpus_reason,
    )
