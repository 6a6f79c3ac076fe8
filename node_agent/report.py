"""The node's report: what it offers, what it can and cannot enforce, what it is made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, get_args

import msgspec
from msgspec.structs import replace

from idl.control import NodeReport
from idl.ids import Incarnation
from idl.jobs import LimitName
from idl.ledger import Capacity
from idl.topology import GpuInfo, MigInstance, Topology
from idl.units import MIB
from node_agent.cdi import CdiDevices
from node_agent.core.cdi import Applied
from node_agent.core.gpus import CONTROL_DEVICES, GpuDevices
from node_agent.sandbox.plan import Enforcement, Limit
from node_agent.topology.cpu import read_text
from node_agent.topology.node import NodeTopology
from node_agent.topology.selection import select_cpus, select_gpus, share_of_memory

RESERVED_MEMORY_BYTES: Final = 512 * MIB
"""Left to the agent and the system where nobody says what to offer."""
_LIMITS: Final[tuple[LimitName, ...]] = get_args(LimitName)
_CAPABILITIES: Final = Path("/proc/driver/nvidia/capabilities")


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator lets this node offer; 0 and "": what the machine has.

    `gpus`, `cpus`: as `node_agent.topology.selection` reads them. `profile`: the machine to play.
    """

    cpu_millis: int = 0
    memory_bytes: int = 0
    labels: dict[str, str] = {}
    gpus: str = ""
    cpus: str = ""
    profile: str = ""


def offered(topology: NodeTopology, offer: Offer) -> Topology:
    """The part of the machine that this node offers. Raises ConfigError.

    A node that offers less CPU time than the machine has (because it is told so, or has a quota)
    shares its CPUs with others and pins nobody to a core, unless it is told which CPUs are its own
    (`cpus`).
    """
    parts = select_gpus(topology.parts, offer.gpus)
    shares = _cpu(topology, offer) < 1000 * len(topology.cpus)
    if shares and not offer.cpus:
        parts = replace(parts, numa=tuple(replace(one, cores=()) for one in parts.numa))
    parts = select_cpus(parts, offer.cpus)
    share = _memory(topology, offer) / max(topology.memory_bytes, 1)
    return share_of_memory(parts, share)


def _cpu(topology: NodeTopology, offer: Offer) -> int:
    return offer.cpu_millis or topology.cpu_millis


def _memory(topology: NodeTopology, offer: Offer) -> int:
    return offer.memory_bytes or max(MIB, topology.memory_bytes - RESERVED_MEMORY_BYTES)


def gpu_devices(
    topology: Topology, cdi: CdiDevices | None = None, dev: Path = Path("/dev")
) -> GpuDevices:
    """The device nodes of the GPUs that have one here (a container may be given fewer).

    Where a CDI spec knows a GPU, its nodes are those of the spec.
    """
    if topology.profile:
        pretended: dict[int, tuple[tuple[str, ...], str]] = {
            gpu.index: ((), gpu.uuid) for gpu in topology.gpus
        }
        parts: dict[str, tuple[str, ...]] = {p.uuid: () for gpu in topology.gpus for p in gpu.mig}
        return GpuDevices(pretended, (), parts, simulated=True)
    specs = {} if cdi is None else cdi.found
    found: dict[int, tuple[tuple[str, ...], str]] = {
        gpu.index: ((f"/dev/nvidia{gpu.minor}",), gpu.uuid)
        for gpu in topology.gpus
        if gpu.minor >= 0 and (dev / f"nvidia{gpu.minor}").exists()
    }
    mig = {
        part.uuid: (*found[gpu.index][0], *capabilities)
        for gpu in topology.gpus
        for part in gpu.mig
        if gpu.index in found and (capabilities := _capabilities(gpu, part, dev))
    }
    control = (path for path in CONTROL_DEVICES if (dev / Path(path).name).exists())
    for gpu in topology.gpus:
        if nodes := _by_spec(specs, gpu.index, dev):
            found[gpu.index] = (nodes, gpu.uuid)
        mig |= {p.uuid: nodes for p in gpu.mig if (nodes := _by_spec(specs, p.uuid, dev))}
    return GpuDevices(found, control, mig, {key: one.env for key, one in specs.items()})


def _by_spec(specs: Mapping[int | str, Applied], key: int | str, dev: Path) -> tuple[str, ...]:
    """Nodes that a spec gives, those that are here; () where none knows the device."""
    spec = specs.get(key)
    nodes = () if spec is None else spec.nodes
    return tuple(path for path in nodes if (dev / Path(path).relative_to("/dev")).exists())


def _capabilities(gpu: GpuInfo, part: MigInstance, dev: Path) -> tuple[str, ...]:
    """/dev/nvidia-caps/* that let a process use this MIG instance; () where they are not here.

    Source: NVIDIA's MIG guide, "Device Nodes and Capabilities".
    """
    instance = _CAPABILITIES / f"gpu{gpu.minor}/mig/gi{part.gpu_instance}"
    paths = []
    for file in (instance / "access", instance / f"ci{part.compute_instance}/access"):
        words = dict(line.split(":")[:2] for line in read_text(file).splitlines() if ":" in line)
        minor = words.get("DeviceFileMinor", "").strip()
        if not minor or not (dev / f"nvidia-caps/nvidia-cap{minor}").exists():
            return ()
        paths.append(f"/dev/nvidia-caps/nvidia-cap{minor}")
    return tuple(paths)


def with_devices(topology: Topology, devices: GpuDevices) -> Topology:
    """`topology` where a GPU that jobs here could not be given says so."""
    gpus = []
    for gpu in topology.gpus:
        reason = gpu.unhealthy
        if gpu.compute_mode == "prohibited":
            reason = reason or "its compute mode is prohibited (nvidia-smi -c 0)"
        if not reason and not devices.has(gpu.index):
            reason = (
                f"no device node /dev/nvidia{gpu.minor} here"
                if gpu.minor >= 0
                else ("its device node is not known")
            )
        mig = tuple(part for part in gpu.mig if devices.has(part.uuid))
        gpus.append(replace(gpu, unhealthy=reason, mig=mig))
    return replace(topology, gpus=tuple(gpus))


def whole_gpus(parts: Topology) -> tuple[int, ...]:
    """Indices of the healthy, undivided GPUs."""
    return tuple(gpu.index for gpu in parts.gpus if not gpu.unhealthy and not gpu.mig_mode)


def with_health(report: NodeReport, reasons: Mapping[str, str]) -> NodeReport:
    """The report where the GPUs in `reasons` (by UUID) are ill and all others well."""
    gpus = tuple(replace(gpu, unhealthy=reasons.get(gpu.uuid, "")) for gpu in report.topology.gpus)
    parts = replace(report.topology, gpus=gpus)
    return replace(
        report, topology=parts, capacity=replace(report.capacity, gpus=whole_gpus(parts))
    )


def build_report(
    pool: str,
    node: str,
    incarnation: Incarnation,
    offer: Offer,
    enforcement: Enforcement,
    topology: NodeTopology,
    parts: Topology,
    images: dict[str, str],
) -> NodeReport:
    """The report of this machine, of which `parts` are offered."""
    enforced = set(enforcement.enforced)
    if offer.profile:  # nobody is bound to CPUs that are not there
        enforced.add(Limit.CPUSET)
    return NodeReport(
        pool=pool,
        node=node,
        incarnation=incarnation,
        capacity=Capacity(
            cpu_millis=_cpu(topology, offer),
            memory_bytes=_memory(topology, offer),
            gpus=whole_gpus(parts),
        ),
        enforces=tuple(name for name in _LIMITS if Limit(name) in enforced),
        missing={
            limit.value: why for limit, why in enforcement.missing.items() if limit not in enforced
        },
        sandbox=f"{enforcement.backend}, {enforcement.mode}, cgroup {enforcement.cgroup}",
        labels=offer.labels,
        topology=parts,
        simulated=bool(offer.profile),
        images=images,
    )
