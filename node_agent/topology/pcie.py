"""Where PCI devices sit: the bridges between them, their NUMA node, and the network adapters.

Read from sysfs, where a device's real path names every bridge above it:
`/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from idl.topology import (
    PCIE_HOST_BRIDGE,
    PCIE_INTERNAL,
    PCIE_MULTIPLE,
    PCIE_NODE,
    PCIE_SINGLE,
    PCIE_SYSTEM,
    NicInfo,
)
from node_agent.topology.cpu import read_text

_BELOW_ONE_SWITCH: Final = 2
"""Below the bridge that two devices share: a switch's downstream port, and the device."""


class PciPlace(NamedTuple):
    """A device's path of bridges from the host bridge down to itself, and its NUMA node."""

    path: tuple[str, ...]
    numa_node: int


def place_of(device: Path) -> PciPlace:
    """The place of a device folder or of a link to one; an empty path where there is none."""
    numa = read_text(device / "numa_node").strip()
    node = int(numa) if numa.removeprefix("-").isdigit() else -1
    if not device.exists():
        return PciPlace((), node)
    parts = device.resolve().parts
    bridges = [at for at, part in enumerate(parts) if part.startswith("pci")]
    path = parts[bridges[0] :] if bridges else ()
    while path and ":" not in path[-1]:  # below its PCI device: a virtio adapter
        path = path[:-1]
    return PciPlace(path, node)


def level(one: PciPlace, other: PciPlace) -> int:
    """PCIe level between two devices, as `nvidia-smi topo -m` names it (`PCIE_LEVELS`)."""
    if one.path and one.path == other.path:
        return PCIE_INTERNAL
    shared = 0
    for mine, theirs in zip(one.path, other.path, strict=False):
        if mine != theirs:
            break
        shared += 1
    if shared == 0:
        return PCIE_NODE if one.numa_node == other.numa_node else PCIE_SYSTEM
    if shared == 1:
        return PCIE_HOST_BRIDGE
    deepest = max(len(one.path), len(other.path)) - shared
    return PCIE_SINGLE if deepest <= _BELOW_ONE_SWITCH else PCIE_MULTIPLE


def nics(sysfs: Path, gpus: tuple[PciPlace, ...]) -> tuple[NicInfo, ...]:
    """Physical network adapters, Ethernet and InfiniBand; one adapter is listed once.

    An InfiniBand device is shown by its own name (`mlx5_0`), not by its network interface's.
    """
    found: dict[tuple[str, ...], NicInfo] = {}
    for kind in ("infiniband", "net"):
        folder = sysfs / "class" / kind
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        for name in names:
            place = place_of(folder / name / "device")
            if not place.path or place.path in found:
                continue  # virtual (no PCI device), or known by another name
            found[place.path] = NicInfo(
                name=name,
                numa_node=place.numa_node,
                pcie_bus_id=place.path[-1],
                levels=tuple(level(place, gpu) if gpu.path else PCIE_SYSTEM for gpu in gpus),
            )
    return tuple(sorted(found.values(), key=lambda nic: nic.pcie_bus_id))
