"""Machines from a readable description: a sysfs and proc tree and an NVML for one file of YAML.

The agent's own reading code runs on them unchanged. Tests use them, and `--node-profile`, which
plays such a machine on hardware that has nothing of it (then the node is marked simulated).
The descriptions are in `profiles/`; each names the public report that it follows.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from idl.errors import ConfigError
from idl.topology import format_cpu_list, parse_cpu_list
from idl.units import parse_bytes
from node_agent.topology.described_nvml import DescribedDriver
from node_agent.topology.node import NodeTopology, read_topology
from node_agent.topology.nvml import Nvml

_BUSES_PER_HOST_BRIDGE: Final = 0x20
_IN_MEMORY: Final = "/dev/shm"
"""A tree has thousands of files for a moment; a disk would be a hundred times slower."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class DescribedNuma(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A domain. Of `threads` per core, the list's first half are the first threads."""

    cpus: str
    package: int = 0


class DescribedCaches(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes; `l3_cores`: cores that share one L3, 0 for all of the package."""

    l1d: str = "32K"
    l1i: str = "32K"
    l2: str
    l3: str
    l3_cores: int = 0


class DescribedMig(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One MIG instance; `start` and `size` in memory slices."""

    profile: str
    memory: str
    start: int
    size: int


class DescribedDevice(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU or adapter. `at`: host bridge, root port and, where there is one, leaf switch.

    Devices of one leaf switch are PIX, of one root port PXB, of one host bridge PHB.
    """

    at: str
    numa: int = -1
    name: str = ""
    mig: tuple[DescribedMig, ...] = ()


class DescribedGpus(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All GPUs of a machine: one model. `switched`: NVLinks of each into NVSwitch."""

    product_name: str
    architecture: str
    compute_capability: str
    memory: str
    devices: tuple[DescribedDevice, ...]
    switched: int = 0
    nvlinks: str = ""


class Description(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine. `distances`: SLIT to the same package, to another one."""

    title: str
    source: str
    memory: str
    numa: tuple[DescribedNuma, ...]
    threads: int = 2
    distances: tuple[int, int] = (12, 32)
    caches: DescribedCaches
    gpus: DescribedGpus
    nics: tuple[DescribedDevice, ...] = ()
    driver_version: str = "570.86.15"

    @property
    def memory_bytes(self) -> int:
        """Of the whole machine."""
        return parse_bytes(self.memory)

    def links(self) -> tuple[tuple[int, ...], ...]:
        """Direct NVLinks between GPUs; zeros where there are none."""
        size = len(self.gpus.devices)
        rows = [line.split() for line in self.gpus.nvlinks.strip().splitlines()]
        if not rows:
            return tuple((0,) * size for _ in range(size))
        return tuple(tuple(int(word) if word.isdigit() else 0 for word in row) for row in rows)


def profile_names() -> tuple[str, ...]:
    """The machines that are packaged."""
    folder = resources.files("node_agent.topology") / "profiles"
    files = (Path(entry.name) for entry in folder.iterdir())
    return tuple(sorted(path.stem for path in files if path.suffix == ".yaml"))


def load_profile(name: str) -> Description:
    """One of `profile_names()`, or the path of a file like them. Raises ConfigError."""
    if name.endswith((".yaml", ".yml")):
        try:
            return _description(Path(name).read_text(encoding="utf-8"), name)
        except OSError as error:
            raise ConfigError(f"cannot read node profile {name}: {error.strerror}") from error
    known = profile_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there: {', '.join(known)}"
        raise ConfigError(f"no node profile {name!r}; {hint}")
    file = resources.files("node_agent.topology") / "profiles" / f"{name}.yaml"
    return _description(file.read_text(encoding="utf-8"), name)


def _description(text: str, origin: str) -> Description:
    try:
        found = msgspec.convert(yaml.safe_load(text), Description)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"node profile {origin}: {' '.join(str(error).split())}") from error
    size = len(found.gpus.devices)
    if [len(row) for row in found.links()] != [size] * size:
        raise ConfigError(f"node profile {origin}: nvlinks must have {size} rows of {size}")
    return found


def read_described(description: Description, profile: str = "") -> NodeTopology:
    """The machine as the agent's reading code sees it."""
    memory = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="outrider-profile-", dir=memory))
    try:
        build_tree(description, root)
        found = read_topology(
            sysfs=root / "sys",
            proc=root / "proc",
            affinity=frozenset(_cpus(description)),
            connect=lambda: described_nvml(description),
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    parts = msgspec.structs.replace(found.parts, profile=profile)
    return msgspec.structs.replace(found, parts=parts)


def described_nvml(description: Description, **faults: Any) -> Nvml:
    """A connection to the described machine's driver; `faults` as `DescribedDriver` takes them."""
    return Nvml(DescribedDriver(description, bus_ids(description), **faults))


# --- the tree -----------------------------------------------------------------------------------


def _put(path: Path, text: str) -> None:
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except FileNotFoundError:  # the folder's first file: looking each time would double the time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")


def _cpus(description: Description) -> tuple[int, ...]:
    return parse_cpu_list(",".join(domain.cpus for domain in description.numa))


def _cores(domain: DescribedNuma, threads: int) -> list[tuple[int, ...]]:
    cpus = parse_cpu_list(domain.cpus)
    count = len(cpus) // threads
    return [tuple(cpus[core + count * n] for n in range(threads)) for core in range(count)]


def build_tree(description: Description, root: Path) -> None:
    """Writes `root/sys` and `root/proc`."""
    _put(root / "proc/meminfo", f"MemTotal: {description.memory_bytes // 1024} kB")
    cpus = _cpus(description)
    _put(root / "sys/devices/system/cpu/online", format_cpu_list(cpus))
    _numa_tree(description, root / "sys/devices/system/node")
    _cpu_tree(description, root / "sys/devices/system/cpu")
    _pci_tree(description, root / "sys")


def _numa_tree(description: Description, node: Path) -> None:
    domains = description.numa
    near, far = description.distances
    _put(node / "online", format_cpu_list(range(len(domains))))
    for number, domain in enumerate(domains):
        distances = [
            10 if other == number else near if peer.package == domain.package else far
            for other, peer in enumerate(domains)
        ]
        memory_kb = description.memory_bytes // len(domains) // 1024
        _put(node / f"node{number}/cpulist", domain.cpus)
        _put(node / f"node{number}/meminfo", f"Node {number} MemTotal: {memory_kb} kB")
        _put(node / f"node{number}/distance", " ".join(map(str, distances)))


def _cpu_tree(description: Description, root: Path) -> None:
    caches, number = description.caches, 0
    by_package: dict[int, list[int]] = {}
    for domain in description.numa:
        by_package.setdefault(domain.package, []).extend(parse_cpu_list(domain.cpus))
    for domain in description.numa:
        cores = _cores(domain, description.threads)
        for at, core in enumerate(cores):
            group = caches.l3_cores or len(cores)
            first = at // group * group
            near = [cpu for peer in cores[first : first + group] for cpu in peer]
            l3 = near if caches.l3_cores else by_package[domain.package]
            kinds = (
                (1, "Data", caches.l1d, core), (1, "Instruction", caches.l1i, core),
                (2, "Unified", caches.l2, core), (3, "Unified", caches.l3, l3),
            )  # fmt: skip
            for cpu in core:
                _put(root / f"cpu{cpu}/topology/physical_package_id", str(domain.package))
                _put(root / f"cpu{cpu}/topology/core_id", str(number))
                for index, (level, kind, size, sharers) in enumerate(kinds):
                    folder = root / f"cpu{cpu}/cache/index{index}"
                    _put(folder / "level", str(level))
                    _put(folder / "type", kind)
                    _put(folder / "size", size)
                    _put(folder / "shared_cpu_list", format_cpu_list(sharers))
            number += 1


def bus_ids(description: Description) -> dict[int, str]:
    """PCI address of each GPU, by index."""
    paths = _pci_paths(description)
    return {index: paths[index][-1] for index in range(len(description.gpus.devices))}


def _pci_paths(description: Description) -> list[tuple[str, ...]]:
    """sysfs paths of GPUs and then NICs: host bridge, root port, switches, device."""
    next_bus: dict[int, int] = {}
    switches: dict[tuple[int, ...], str] = {}
    paths = []

    def bus(bridge: int) -> int:
        next_bus[bridge] = next_bus.get(bridge, bridge * _BUSES_PER_HOST_BRIDGE) + 1
        return next_bus[bridge]

    for device in (*description.gpus.devices, *description.nics):
        bridge, port, *leaf = map(int, device.at.split("."))
        base = f"{bridge * _BUSES_PER_HOST_BRIDGE:02x}"
        path = [f"pci0000:{base}", f"0000:{base}:{port:02x}.0"]
        for depth in range(len(leaf) * 2):  # a switch of switches; each has an upstream port
            key = (bridge, port, *leaf[: (depth + 1) // 2], depth)
            if key not in switches:
                switches[key] = f"0000:{bus(bridge):02x}:00.0"
            path.append(switches[key])
        if leaf:  # its own downstream port
            path.append(f"0000:{bus(bridge):02x}:00.0")
        path.append(f"0000:{bus(bridge):02x}:00.0")
        paths.append(tuple(path))
    return paths


def _pci_tree(description: Description, sysfs: Path) -> None:
    devices = (*description.gpus.devices, *description.nics)
    for device, path in zip(devices, _pci_paths(description), strict=True):
        folder = sysfs.joinpath("devices", *path)
        numa = device.numa if len(description.numa) > 1 else -1  # as Linux says of one domain
        _put(folder / "numa_node", str(numa))
        link = sysfs / "bus/pci/devices" / path[-1]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
        if device.name:
            adapter = sysfs / "class/infiniband" / device.name
            adapter.mkdir(parents=True)
            (adapter / "device").symlink_to(folder)
