"""GPUs and the NVLinks between them, as the driver's NVML reports them.

NVML is reached through a small protocol, so that tests drive the same code with recorded machines.
A machine without a driver has no GPUs and a one-line reason; one broken query loses one field.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

_T = TypeVar("_T")
# Links per GPU: 6 on V100, 12 on A100, 18 on H100 and B200 (NVML_NVLINK_MAX_LINKS).
NVLINKS_MAX = 18
_REMOTE_GPU, _REMOTE_SWITCH = 0, 2  # nvmlIntNvLinkDeviceType_t


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU; names as Kubernetes DRA publishes them."""

    index: int
    uuid: str
    product_name: str
    memory_bytes: int
    numa_node: int | None
    pcie_bus_id: str
    driver_version: str
    cuda_compute_capability: str
    minor: int | None


class GpuReport(msgspec.Struct, frozen=True):
    """GPUs of the node; ``nvlinks[i][j]`` counts links between two, ``reason`` says why none."""

    gpus: tuple[Gpu, ...] = ()
    nvlinks: tuple[tuple[int, ...], ...] = ()
    reason: str = ""


class Nvml(Protocol):
    """What we ask of the driver. Handles are opaque. Any method may raise NvmlUnavailable."""

    def driver_version(self) -> str: ...
    def count(self) -> int: ...
    def handle(self, index: int) -> Any: ...
    def uuid(self, handle: Any) -> str: ...
    def name(self, handle: Any) -> str: ...
    def memory_bytes(self, handle: Any) -> int: ...
    def pci_bus_id(self, handle: Any) -> str: ...
    def numa_node(self, handle: Any) -> int: ...
    def minor(self, handle: Any) -> int: ...
    def compute_capability(self, handle: Any) -> tuple[int, int]: ...
    def link_active(self, handle: Any, link: int) -> bool: ...
    def link_remote_type(self, handle: Any, link: int) -> int: ...
    def link_remote_bus_id(self, handle: Any, link: int) -> str: ...
    def close(self) -> None: ...


class NvmlUnavailable(Exception):  # noqa: N818 - it reads as what it says in `except`
    """The driver does not answer this; the message is one line."""


def read_gpus(connect: Callable[[], Nvml]) -> GpuReport:
    """Everything NVML tells about this node's GPUs. Never raises because of the driver."""
    try:
        nvml = connect()
    except NvmlUnavailable as error:
        return GpuReport(reason=str(error))
    try:
        handles = [nvml.handle(index) for index in range(nvml.count())]
        version = nvml.driver_version()
        gpus = tuple(_gpu(nvml, index, handle, version) for index, handle in enumerate(handles))
        return GpuReport(gpus=gpus, nvlinks=_nvlinks(nvml, handles, gpus))
    except NvmlUnavailable as error:
        return GpuReport(reason=str(error))
    finally:
        nvml.close()


def _gpu(nvml: Nvml, index: int, handle: Any, driver_version: str) -> Gpu:
    major, minor = _or(lambda: nvml.compute_capability(handle), (0, 0))
    numa_node = _or(lambda: nvml.numa_node(handle), -1)
    device_minor = _or(lambda: nvml.minor(handle), -1)
    return Gpu(
        index=index,
        uuid=nvml.uuid(handle),
        product_name=_or(lambda: nvml.name(handle), ""),
        memory_bytes=_or(lambda: nvml.memory_bytes(handle), 0),
        numa_node=numa_node if numa_node >= 0 else None,
        pcie_bus_id=normal_bus_id(_or(lambda: nvml.pci_bus_id(handle), "")),
        driver_version=driver_version,
        cuda_compute_capability=f"{major}.{minor}" if major else "",
        minor=device_minor if device_minor >= 0 else None,
    )


def _or(query: Callable[[], _T], otherwise: _T) -> _T:
    try:
        return query()
    except NvmlUnavailable:
        return otherwise  # e.g. unified-memory machines report no memory size


def normal_bus_id(bus_id: str) -> str:
    """``00000000:17:00.0`` (NVML) and ``0000:17:00.0`` (sysfs) are the same device."""
    domain, _, rest = bus_id.lower().partition(":")
    if not rest:
        return bus_id.lower()
    return f"{int(domain, 16):04x}:{rest}"


def _nvlinks(nvml: Nvml, handles: list[Any], gpus: tuple[Gpu, ...]) -> tuple[tuple[int, ...], ...]:
    """Links per pair. Behind NVSwitch every link ends in a switch, through which any two GPUs talk
    with as many links as both have; a direct link counts for its own pair only.
    """
    by_bus = {gpu.pcie_bus_id: gpu.index for gpu in gpus if gpu.pcie_bus_id}
    size = len(handles)
    direct = [[0] * size for _ in range(size)]
    switched = [0] * size
    for index, handle in enumerate(handles):
        for link in range(NVLINKS_MAX):
            if not _or(partial(nvml.link_active, handle, link), False):
                continue
            kind = _or(partial(nvml.link_remote_type, handle, link), _REMOTE_GPU)
            if kind == _REMOTE_SWITCH:
                switched[index] += 1
                continue
            remote = _or(partial(nvml.link_remote_bus_id, handle, link), "")
            other = by_bus.get(normal_bus_id(remote))
            if other is not None and other != index:
                direct[index][other] += 1
    for a in range(size):
        for b in range(size):
            if a != b:
                direct[a][b] += min(switched[a], switched[b])
    # Each side reports its own end; should one side fail to, the other's word holds.
    return tuple(tuple(max(direct[a][b], direct[b][a]) for b in range(size)) for a in range(size))


class PynvmlAdapter:
    """The real thing: the ``pynvml`` module (package nvidia-ml-py)."""

    def __init__(self, module: Any) -> None:
        self._nvml = module

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError as error:
            raise NvmlUnavailable(f"{name}: {error}") from error
        except AttributeError as error:  # an older binding or driver lacks the function
            raise NvmlUnavailable(f"{name}: {error}") from error

    def driver_version(self) -> str:
        return str(self._call("nvmlSystemGetDriverVersion"))

    def count(self) -> int:
        return int(self._call("nvmlDeviceGetCount"))

    def handle(self, index: int) -> Any:
        return self._call("nvmlDeviceGetHandleByIndex", index)

    def uuid(self, handle: Any) -> str:
        return str(self._call("nvmlDeviceGetUUID", handle))

    def name(self, handle: Any) -> str:
        return str(self._call("nvmlDeviceGetName", handle))

    def memory_bytes(self, handle: Any) -> int:
        return int(self._call("nvmlDeviceGetMemoryInfo", handle).total)

    def pci_bus_id(self, handle: Any) -> str:
        return str(self._call("nvmlDeviceGetPciInfo", handle).busId)

    def numa_node(self, handle: Any) -> int:
        return int(self._call("nvmlDeviceGetNumaNodeId", handle))

    def minor(self, handle: Any) -> int:
        return int(self._call("nvmlDeviceGetMinorNumber", handle))

    def compute_capability(self, handle: Any) -> tuple[int, int]:
        major, minor = self._call("nvmlDeviceGetCudaComputeCapability", handle)
        return int(major), int(minor)

    def link_active(self, handle: Any, link: int) -> bool:
        return bool(self._call("nvmlDeviceGetNvLinkState", handle, link))

    def link_remote_type(self, handle: Any, link: int) -> int:
        return int(self._call("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link))

    def link_remote_bus_id(self, handle: Any, link: int) -> str:
        return str(self._call("nvmlDeviceGetNvLinkRemotePciInfo", handle, link).busId)

    def close(self) -> None:
        self._call("nvmlShutdown")


def connect_nvml() -> Nvml:
    """Load and initialise the driver's library."""
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailable(f"no NVML binding: {error}") from error
    adapter = PynvmlAdapter(pynvml)
    adapter._call("nvmlInit")
    return adapter
