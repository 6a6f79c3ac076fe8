"""GPUs, their MIG parts, and the links between them, as NVML reports them.

A machine without a driver has no GPUs and a one-line reason; one broken query loses one field.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from idl.topology import PCIE_SYSTEM, GpuInfo, Matrix, MigInstance, format_cpu_list
from node_agent.topology.nvml import MigFacts, Nvml, NvmlUnavailable

_T = TypeVar("_T")
NVLINKS_MAX: Final = 18
"""Links per GPU: 6 on V100, 12 on A100, 18 on H100 and B200 (NVML_NVLINK_MAX_LINKS)."""
_REMOTE_GPU, _REMOTE_SWITCH = 0, 2  # nvmlIntNvLinkDeviceType_t
_MIG_WORD: Final = "MIG "
"""A MIG device's name is its GPU's name, this, and its profile."""


class GpuReport(msgspec.Struct, frozen=True):
    """GPUs of the node, links and PCIe levels between them; `reason` says why there are none."""

    gpus: tuple[GpuInfo, ...] = ()
    nvlinks: Matrix = ()
    pcie: Matrix = ()
    driver_version: str = ""
    reason: str = ""


def read_gpus(connect: Callable[[], Nvml]) -> GpuReport:
    """Everything NVML tells about this node's GPUs. Never raises because of the driver."""
    try:
        nvml = connect()
    except NvmlUnavailable as error:
        return GpuReport(reason=str(error))
    try:
        found = [_gpu(nvml, index) for index in range(nvml.count())]
        handles = [handle for _, handle in found]
        gpus = tuple(gpu for gpu, _ in found)
        return GpuReport(
            gpus=gpus,
            nvlinks=_nvlinks(nvml, handles, gpus),
            pcie=_pcie(nvml, handles),
            driver_version=answer(nvml.driver_version, ""),
        )
    except NvmlUnavailable as error:
        return GpuReport(reason=str(error))
    finally:
        answer(nvml.close, None)


def answer(query: Callable[[], _T], otherwise: _T) -> _T:
    """What the driver answers, or `otherwise`: it does not know every question everywhere."""
    try:
        return query()
    except NvmlUnavailable:
        return otherwise  # e.g. machines of one memory report no memory size


def _gpu(nvml: Nvml, index: int) -> tuple[GpuInfo, Any]:
    """One GPU; where the driver has lost it, a place holder that says so."""
    try:
        handle = nvml.handle(index)
        uuid = nvml.uuid(handle)
    except NvmlUnavailable as error:
        return GpuInfo(index=index, uuid=f"unknown-{index}", unhealthy=str(error)), None
    mig_mode = answer(partial(nvml.mig_mode, handle), False)
    nothing: list[MigFacts] = []
    facts = answer(partial(nvml.mig_devices, handle), nothing) if mig_mode else nothing
    return GpuInfo(
        index=index,
        uuid=uuid,
        product_name=answer(partial(nvml.name, handle), ""),
        architecture=answer(partial(nvml.architecture, handle), ""),
        cuda_compute_capability=answer(partial(nvml.compute_capability, handle), ""),
        memory_bytes=answer(partial(nvml.memory_bytes, handle), 0),
        numa_node=answer(partial(nvml.numa_node, handle), -1),
        pcie_bus_id=normal_bus_id(answer(partial(nvml.pci_bus_id, handle), "")),
        minor=answer(partial(nvml.minor, handle), -1),
        cpus=format_cpu_list(answer(partial(nvml.cpu_affinity, handle), ())),
        mig_mode=mig_mode,
        mig=tuple(_mig(uuid, one) for one in facts),
        compute_mode=answer(partial(nvml.compute_mode, handle), ""),
        persistence=answer(partial(nvml.persistence, handle), False),
        ecc=answer(partial(nvml.ecc, handle), False),
    ), handle


def _mig(parent: str, facts: MigFacts) -> MigInstance:
    _, _, profile = facts.name.rpartition(_MIG_WORD)
    return MigInstance(
        uuid=facts.uuid,
        parent_uuid=parent,
        profile=profile.strip(),
        memory_bytes=facts.memory_bytes,
        start=facts.start,
        size=facts.size,
        compute_slices=facts.compute_slices,
        gpu_instance=facts.gpu_instance,
        compute_instance=facts.compute_instance,
    )


def normal_bus_id(bus_id: str) -> str:
    """``00000000:17:00.0`` (NVML) and ``0000:17:00.0`` (sysfs) are the same device."""
    domain, _, rest = bus_id.lower().partition(":")
    if not rest:
        return bus_id.lower()
    return f"{int(domain, 16):04x}:{rest}"


def _pcie(nvml: Nvml, handles: list[Any]) -> Matrix:
    """Levels between GPUs; () where the driver does not tell (then sysfs does)."""

    def level(one: Any, other: Any) -> int:
        if one is None or other is None:
            return PCIE_SYSTEM  # lost: nowhere near
        return answer(partial(nvml.common_ancestor, one, other), -1)

    levels = [
        [0 if i == j else level(one, other) for j, other in enumerate(handles)]
        for i, one in enumerate(handles)
    ]
    if any(level < 0 for row in levels for level in row):
        return ()
    return tuple(tuple(row) for row in levels)


def _nvlinks(nvml: Nvml, handles: list[Any], gpus: tuple[GpuInfo, ...]) -> Matrix:
    """Links per pair. Behind NVSwitch every link ends in a switch, through which any two GPUs talk
    with as many links as both have; a direct link counts for its own pair only.
    """
    by_bus = {gpu.pcie_bus_id: gpu.index for gpu in gpus if gpu.pcie_bus_id}
    size = len(handles)
    direct = [[0] * size for _ in range(size)]
    switched = [0] * size
    for index, handle in enumerate(handles):
        if handle is None:
            continue
        for link in range(NVLINKS_MAX):
            if not answer(partial(nvml.link_active, handle, link), False):
                continue
            kind = answer(partial(nvml.link_remote_type, handle, link), _REMOTE_GPU)
            if kind == _REMOTE_SWITCH:
                switched[index] += 1
                continue
            remote = answer(partial(nvml.link_remote_bus_id, handle, link), "")
            other = by_bus.get(normal_bus_id(remote))
            if other is not None and other != index:
                direct[index][other] += 1
    for a in range(size):
        for b in range(size):
            if a != b:
                direct[a][b] += min(switched[a], switched[b])
    # Each side reports its own end; should one side fail to, the other's word holds.
    return tuple(tuple(max(direct[a][b], direct[b][a]) for b in range(size)) for a in range(size))
