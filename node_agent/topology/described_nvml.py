# ruff: noqa: N802
# Function names are those of the binding that it stands in for.
"""The `pynvml` module of a described machine: the functions that we call, with NVML's answers.

It stands in for the binding, below our adapter, so that the adapter runs as on a real machine.
It breaks on request: whole queries, single GPUs, ECC counters, Xid events.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from idl.topology import parse_cpu_list
from idl.units import parse_bytes

if TYPE_CHECKING:
    from node_agent.topology.described import DescribedMig, Description

_NOT_SUPPORTED, _NOT_FOUND, _TIMEOUT, _GPU_IS_LOST = 3, 6, 10, 15
_SWITCHES: Final = 6
"""NVSwitch chips that the links of a GPU are spread over; only that they are switches matters."""
_MIG_PARTS_MAX: Final = 7


class DescribedError(Exception):
    """As pynvml.NVMLError: a value, and words."""

    def __init__(self, value: int) -> None:
        super().__init__({3: "Not Supported", 6: "Not Found", 10: "Timeout",
                          15: "GPU is lost"}.get(value, f"error {value}"))  # fmt: skip
        self.value = value


class DescribedDriver:
    """Handles are indices of GPUs, or (index, place) of MIG devices.

    `broken`: functions that fail, by name, with their error value. `lost`: GPUs that fell off the
    bus. `uncorrected`: double-bit errors by GPU. `xids`: events to come. `processes`: by GPU.
    """

    NVMLError = DescribedError
    NVML_DEVICE_ARCH_VOLTA = 5
    NVML_DEVICE_ARCH_TURING = 6
    NVML_DEVICE_ARCH_AMPERE = 7
    NVML_DEVICE_ARCH_ADA = 8
    NVML_DEVICE_ARCH_HOPPER = 9
    NVML_DEVICE_ARCH_BLACKWELL = 10
    NVML_COMPUTEMODE_DEFAULT = 0
    NVML_COMPUTEMODE_PROHIBITED = 2
    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3
    NVML_ERROR_TIMEOUT = _TIMEOUT

    def __init__(
        self,
        machine: Description,
        bus_ids: Mapping[int, str],
        *,
        broken: Mapping[str, int] | None = None,
        lost: frozenset[int] = frozenset(),
        uncorrected: Mapping[int, int] | None = None,
        xids: list[tuple[int, int]] | None = None,
        processes: Mapping[int, list[tuple[int, int]]] | None = None,
    ) -> None:
        self._machine, self._bus_ids = machine, bus_ids
        self._broken, self._lost = dict(broken or {}), lost
        self._uncorrected, self._xids = dict(uncorrected or {}), xids or []
        self._processes = dict(processes or {})
        self.is_open = True
        links = machine.links()
        self._links = [
            [(0, bus_ids[other]) for other, count in enumerate(row) for _ in range(count)]
            + [(2, f"0000:f{n % _SWITCHES:x}:00.0") for n in range(machine.gpus.switched)]
            for row in links
        ]

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            broken = super().__getattribute__("_broken").get(name)
            if broken is not None:
                raise DescribedError(broken)
        return super().__getattribute__(name)

    def _gpu(self, handle: Any) -> int:
        index = handle[0] if isinstance(handle, tuple) else handle
        if index in self._lost:
            raise DescribedError(_GPU_IS_LOST)
        return int(index)

    def _mig(self, handle: Any) -> DescribedMig:
        parts = self._machine.gpus.devices[handle[0]].mig
        found: DescribedMig = parts[handle[1]]
        return found

    def _uuid(self, *what: int) -> str:
        """Version 5: equal for equal machines, so that tests and replays repeat."""
        name = f"outrider/{self._machine.title}/{'/'.join(map(str, what))}"
        return str(uuid.uuid5(uuid.NAMESPACE_OID, name))

    def _numa(self, index: int) -> int:
        return max(self._machine.gpus.devices[index].numa, 0)

    # The functions of the binding; names and answers are NVML's.

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._machine.driver_version

    def nvmlDeviceGetCount(self) -> int:
        return len(self._machine.gpus.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return self._gpu(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        for index in range(len(self._machine.gpus.devices)):
            if uuid == f"GPU-{self._uuid(index)}":
                return self._gpu(index)
        raise DescribedError(_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        if isinstance(handle, tuple):
            return f"MIG-{self._uuid(*handle)}"
        return f"GPU-{self._uuid(self._gpu(handle))}"

    def nvmlDeviceGetName(self, handle: Any) -> str:
        name = self._machine.gpus.product_name
        return f"{name} MIG {self._mig(handle).profile}" if isinstance(handle, tuple) else name

    def nvmlDeviceGetArchitecture(self, handle: Any) -> int:
        self._gpu(handle)
        return int(getattr(self, f"NVML_DEVICE_ARCH_{self._machine.gpus.architecture.upper()}"))

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        self._gpu(handle)
        major, _, minor = self._machine.gpus.compute_capability.partition(".")
        return int(major), int(minor)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> SimpleNamespace:
        used = sum(size for _, size in self._processes.get(self._gpu(handle), []))
        total = parse_bytes(self._machine.gpus.memory)
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetPciInfo(self, handle: Any) -> SimpleNamespace:
        return SimpleNamespace(busId=f"0000{self._bus_ids[self._gpu(handle)].upper()}")

    def nvmlDeviceGetMinorNumber(self, handle: Any) -> int:
        return self._gpu(handle)

    def nvmlDeviceGetNumaNodeId(self, handle: Any) -> int:
        self._gpu(handle)
        raise DescribedError(_NOT_SUPPORTED)

    def nvmlDeviceGetCpuAffinityWithinScope(
        self, handle: Any, words: int, _scope: int
    ) -> list[int]:
        mask = 0
        for cpu in parse_cpu_list(self._machine.numa[self._numa(self._gpu(handle))].cpus):
            mask |= 1 << cpu
        return [mask >> (64 * word) & (2**64 - 1) for word in range(words)]

    def nvmlDeviceGetTopologyCommonAncestor(self, one: Any, other: Any) -> int:
        devices = self._machine.gpus.devices
        a, b = devices[self._gpu(one)], devices[self._gpu(other)]
        mine, theirs = a.at.split("."), b.at.split(".")
        if mine == theirs:
            return 10
        if len(mine) > 2 and mine[:2] == theirs[:2]:
            return 20
        if mine[0] == theirs[0]:
            return 30
        return 40 if a.numa == b.numa else 50

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int) -> int:
        return int(link < len(self._links[self._gpu(handle)]))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: Any, link: int) -> int:
        return self._links[self._gpu(handle)][link][0]

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: Any, link: int) -> SimpleNamespace:
        return SimpleNamespace(busId=self._links[self._gpu(handle)][link][1])

    def nvmlDeviceGetComputeMode(self, handle: Any) -> int:
        self._gpu(handle)
        return self.NVML_COMPUTEMODE_DEFAULT

    def nvmlDeviceGetPersistenceMode(self, handle: Any) -> int:
        self._gpu(handle)
        return 1

    def nvmlDeviceGetEccMode(self, handle: Any) -> list[int]:
        self._gpu(handle)
        return [1, 1]

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        if self._machine.gpus.architecture in ("volta", "turing", "ada"):
            raise DescribedError(_NOT_SUPPORTED)
        on = int(bool(self._machine.gpus.devices[self._gpu(handle)].mig))
        return [on, on]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        self._gpu(handle)
        return _MIG_PARTS_MAX

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> tuple[int, int]:
        if index >= len(self._machine.gpus.devices[self._gpu(handle)].mig):
            raise DescribedError(_NOT_FOUND)
        return int(handle), index

    def nvmlDeviceGetAttributes(self, handle: Any) -> SimpleNamespace:
        part = self._mig(handle)
        slices = int(part.profile.partition("g")[0])
        memory_mb = parse_bytes(part.memory) >> 20
        return SimpleNamespace(memorySizeMB=memory_mb, computeInstanceSliceCount=slices)

    def nvmlDeviceGetGpuInstanceId(self, handle: Any) -> int:
        return int(handle[1]) + 1

    def nvmlDeviceGetComputeInstanceId(self, _handle: Any) -> int:
        return 0

    def nvmlDeviceGetGpuInstanceById(self, handle: Any, number: int) -> tuple[int, int]:
        return int(handle), number - 1

    def nvmlGpuInstanceGetInfo(self, instance: Any) -> SimpleNamespace:
        part = self._mig(instance)
        return SimpleNamespace(placement=SimpleNamespace(start=part.start, size=part.size))

    def nvmlDeviceGetTotalEccErrors(self, handle: Any, _kind: int, _since: int) -> int:
        return self._uncorrected.get(self._gpu(handle), 0)

    def nvmlDeviceGetRemappedRows(self, handle: Any) -> tuple[int, int, int, int]:
        self._gpu(handle)
        if self._machine.gpus.architecture in ("volta", "turing"):
            raise DescribedError(_NOT_SUPPORTED)
        return 0, 0, 0, 0

    def nvmlDeviceGetRetiredPagesPendingStatus(self, handle: Any) -> int:
        self._gpu(handle)
        if self._machine.gpus.architecture not in ("volta", "turing"):
            raise DescribedError(_NOT_SUPPORTED)
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, _sensor: int) -> int:
        self._gpu(handle)
        return 35

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        self._gpu(handle)
        return 60_000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[SimpleNamespace]:
        found = self._processes.get(self._gpu(handle), [])
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in found]

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, handle: Any, _kinds: int, _events: object) -> None:
        self._gpu(handle)

    def nvmlEventSetFree(self, _events: object) -> None:
        self._xids.clear()

    def nvmlEventSetWait(self, _events: object, _timeout_ms: int) -> SimpleNamespace:
        if not self._xids:
            raise DescribedError(_TIMEOUT)
        device, xid = self._xids.pop(0)
        return SimpleNamespace(device=device, eventData=xid)
