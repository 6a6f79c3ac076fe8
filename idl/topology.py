"""What a node is made of, as far as placement and people look: NUMA domains, GPUs, links, NICs.

It travels in `NodeReport` and, when it changes, in the ledger's `NodeSeen`: a decision that chose
devices by their links can be recomputed from the ledger alone. What changes by the second
(temperature, power, processes) is no part of it; agents publish that as metrics.
Attribute names follow Kubernetes DRA's (`uuid`, `productName`, `pcieBusID`, `parentUUID`, …).
"""

from collections.abc import Iterable
from typing import Final

import msgspec

PCIE_LEVELS: Final = {0: "X", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""nvmlGpuTopologyLevel_t: itself, one PCIe bridge, several, the host bridge, host bridges of one
NUMA node, across sockets; written as `nvidia-smi topo -m` does."""
PCIE_INTERNAL: Final = 0
PCIE_SINGLE: Final = 10
PCIE_MULTIPLE: Final = 20
PCIE_HOST_BRIDGE: Final = 30
PCIE_NODE: Final = 40
PCIE_SYSTEM: Final = 50

Matrix = tuple[tuple[int, ...], ...]


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class NumaInfo(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One NUMA domain. `cpus`: those the node may use, as the kernel writes lists (`0-3,8`).

    `cores`: hardware threads of each physical core. `distances` are SLIT units, 10 = local, in the
    order of the node's domains. `package`: the socket, -1 where the kernel does not say.
    """

    id: int
    cpus: str
    memory_bytes: int
    distances: tuple[int, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    package: int = -1


class CacheInfo(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One kind of cache. `shared_by`: CPU lists of its instances, where cores share them."""

    level: int
    kind: str
    size_bytes: int
    count: int
    shared_by: tuple[str, ...] = ()


class MigInstance(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One MIG compute instance. `start` and `size`: its place in memory slices of the GPU."""

    uuid: str
    parent_uuid: str
    profile: str
    memory_bytes: int
    start: int = -1
    size: int = 0
    compute_slices: int = 0
    gpu_instance: int = -1
    compute_instance: int = -1


class GpuInfo(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One GPU. `minor`: of /dev/nvidiaN, -1 where unknown. `unhealthy`: why it is not offered.

    `cpus`: the CPUs near it, by the driver's word. With `mig_mode` it is offered in `mig` parts.
    """

    index: int
    uuid: str
    product_name: str = ""
    architecture: str = ""
    cuda_compute_capability: str = ""
    memory_bytes: int = 0
    numa_node: int = -1
    pcie_bus_id: str = ""
    minor: int = -1
    cpus: str = ""
    mig_mode: bool = False
    mig: tuple[MigInstance, ...] = ()
    compute_mode: str = ""
    persistence: bool = False
    ecc: bool = False
    unhealthy: str = ""


class NicInfo(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One network adapter. `levels`: PCIe level to each GPU, in their order."""

    name: str
    numa_node: int = -1
    pcie_bus_id: str = ""
    levels: tuple[int, ...] = ()


class Topology(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One node. `nvlinks[i][j]`: links between the i-th and the j-th of `gpus`; `pcie`: levels.

    `gpu_note`: why there are no GPUs. `profile`: of a simulated node, the machine it plays.
    """

    numa: tuple[NumaInfo, ...] = ()
    caches: tuple[CacheInfo, ...] = ()
    gpus: tuple[GpuInfo, ...] = ()
    nvlinks: Matrix = ()
    pcie: Matrix = ()
    nics: tuple[NicInfo, ...] = ()
    driver_version: str = ""
    gpu_note: str = ""
    profile: str = ""


class GpuShare(msgspec.Struct, frozen=True, kw_only=True):
    """A part of one GPU that was given to an attempt: thousandths of its time, bytes of its memory.

    Both are accounting; `docs/topology.md` says what enforces them and where nothing does.
    """

    gpu: int
    millis: int
    memory_bytes: int


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """`0-3,8,10-11` as the kernel writes it; strides (`0-10:2/4`) are not used by sysfs."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cpus))


def parse_cpu_quota(text: str) -> int:
    """Thousandths of a CPU that "QUOTA PERIOD" allows, as in cgroup v2's `cpu.max`; 0: no limit."""
    words = text.split()
    if len(words) != 2 or not all(map(str.isdecimal, words)) or not int(words[1]):
        return 0  # "max", v1's -1, or no such file
    return max(1, 1000 * int(words[0]) // int(words[1]))


def format_cpu_list(cpus: Iterable[int]) -> str:
    """The inverse: shortest form, as cpuset files take it."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
