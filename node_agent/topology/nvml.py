"""The driver's NVML, through the `pynvml` module (package nvidia-ml-py), one method a question.

The module is a parameter: a described machine (`described`) stands in for it, so that the same
lines run with and without a GPU. Every failure is an NvmlUnavailable of one line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Bits of a CPU mask word as NVML hands them out (unsigned long).
_WORD_BITS = 64
_CPU_MASK_WORDS = 64  # 4,096 CPUs: the kernel's own bound on x86 (NR_CPUS)


class NvmlUnavailable(Exception):  # noqa: N818 - it reads as what it says in `except`
    """The driver does not answer this; the message is one line. `code`: NVML's, 0 if none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class MigFacts(NamedTuple):
    """What NVML tells about one MIG device."""

    uuid: str
    name: str
    memory_bytes: int
    compute_slices: int
    gpu_instance: int
    compute_instance: int
    start: int
    size: int


class Nvml:
    """One connection. Handles are opaque. Any method may raise NvmlUnavailable."""

    def __init__(self, module: Any) -> None:
        self._nvml = module
        self._events: Any = None

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError as error:
            code = getattr(error, "value", 0)
            raise NvmlUnavailable(f"{name}: {error}", int(code or 0)) from error
        except Exception as error:  # whatever binding or driver do, it costs one field
            what = str(error) or type(error).__name__
            raise NvmlUnavailable(f"{name}: {what}") from error

    def constant(self, name: str, otherwise: int = 0) -> int:
        """A constant of the binding."""
        return int(getattr(self._nvml, name, otherwise))

    def open(self) -> None:
        """Loads the driver's library."""
        self._call("nvmlInit")

    def close(self) -> None:
        """Lets go of it."""
        if self._events is not None:
            self._call("nvmlEventSetFree", self._events)
            self._events = None
        self._call("nvmlShutdown")

    # --- what it is -----------------------------------------------------------------------------

    def driver_version(self) -> str:
        """E.g. `570.86.15`."""
        return str(self._call("nvmlSystemGetDriverVersion"))

    def count(self) -> int:
        """GPUs that this process may see."""
        return int(self._call("nvmlDeviceGetCount"))

    def handle(self, index: int) -> Any:
        """The GPU at this index, in PCI order."""
        return self._call("nvmlDeviceGetHandleByIndex", index)

    def handle_of(self, uuid: str) -> Any:
        """The GPU of this UUID, whatever its index is now."""
        return self._call("nvmlDeviceGetHandleByUUID", uuid)

    def uuid(self, handle: Any) -> str:
        """`GPU-…` or `MIG-…`."""
        return str(self._call("nvmlDeviceGetUUID", handle))

    def name(self, handle: Any) -> str:
        """Product name."""
        return str(self._call("nvmlDeviceGetName", handle))

    def architecture(self, handle: Any) -> str:
        """`ampere`, `hopper`, …: the binding's constant of that number."""
        number = self._call("nvmlDeviceGetArchitecture", handle)
        prefix = "NVML_DEVICE_ARCH_"
        for name in dir(self._nvml):
            if name.startswith(prefix) and getattr(self._nvml, name) == number:
                return name.removeprefix(prefix).lower()
        raise NvmlUnavailable(f"nvmlDeviceGetArchitecture: {number} is not known")

    def compute_capability(self, handle: Any) -> str:
        """E.g. `8.0`."""
        major, minor = self._call("nvmlDeviceGetCudaComputeCapability", handle)
        return f"{int(major)}.{int(minor)}"

    def memory_bytes(self, handle: Any) -> int:
        """All of its memory."""
        return int(self._call("nvmlDeviceGetMemoryInfo", handle).total)

    def memory_used_bytes(self, handle: Any) -> int:
        """Memory in use by anybody."""
        return int(self._call("nvmlDeviceGetMemoryInfo", handle).used)

    def pci_bus_id(self, handle: Any) -> str:
        """`00000000:17:00.0`."""
        return str(self._call("nvmlDeviceGetPciInfo", handle).busId)

    def minor(self, handle: Any) -> int:
        """N of /dev/nvidiaN."""
        return int(self._call("nvmlDeviceGetMinorNumber", handle))

    # --- where it is ----------------------------------------------------------------------------

    def numa_node(self, handle: Any) -> int:
        """NUMA node of a GPU whose memory is one (coherent machines); others do not answer."""
        return int(self._call("nvmlDeviceGetNumaNodeId", handle))

    def cpu_affinity(self, handle: Any) -> tuple[int, ...]:
        """CPUs of its NUMA node."""
        scope = self.constant("NVML_AFFINITY_SCOPE_NODE")
        words = self._call("nvmlDeviceGetCpuAffinityWithinScope", handle, _CPU_MASK_WORDS, scope)
        return tuple(
            at * _WORD_BITS + bit
            for at, word in enumerate(words)
            for bit in range(_WORD_BITS)
            if word >> bit & 1
        )

    def common_ancestor(self, one: Any, other: Any) -> int:
        """PCIe level between two GPUs (`idl.topology.PCIE_LEVELS`)."""
        return int(self._call("nvmlDeviceGetTopologyCommonAncestor", one, other))

    def link_active(self, handle: Any, link: int) -> bool:
        """Whether this NVLink is up."""
        return bool(self._call("nvmlDeviceGetNvLinkState", handle, link))

    def link_remote_type(self, handle: Any, link: int) -> int:
        """What is at its other end (nvmlIntNvLinkDeviceType_t)."""
        return int(self._call("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link))

    def link_remote_bus_id(self, handle: Any, link: int) -> str:
        """PCI address of the other end."""
        return str(self._call("nvmlDeviceGetNvLinkRemotePciInfo", handle, link).busId)

    # --- modes ----------------------------------------------------------------------------------

    def compute_mode(self, handle: Any) -> str:
        """`default`, `exclusive_process` or `prohibited`."""
        number = self._call("nvmlDeviceGetComputeMode", handle)
        known = ("DEFAULT", "PROHIBITED", "EXCLUSIVE_PROCESS")
        names = {self.constant(f"NVML_COMPUTEMODE_{name}", -1): name.lower() for name in known}
        return names.get(int(number), f"mode {number}")

    def persistence(self, handle: Any) -> bool:
        """Whether the driver stays loaded without clients."""
        return bool(self._call("nvmlDeviceGetPersistenceMode", handle))

    def ecc(self, handle: Any) -> bool:
        """Whether ECC is on."""
        return bool(self._call("nvmlDeviceGetEccMode", handle)[0])

    def mig_mode(self, handle: Any) -> bool:
        """Whether MIG is on now."""
        return bool(self._call("nvmlDeviceGetMigMode", handle)[0])

    def mig_devices(self, handle: Any) -> list[MigFacts]:
        """The MIG devices that exist on this GPU. One that vanished meanwhile is left out."""
        found = []
        for index in range(int(self._call("nvmlDeviceGetMaxMigDeviceCount", handle))):
            try:
                device = self._call("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
                found.append(self._mig(handle, device))
            except NvmlUnavailable:
                continue  # no instance in this place
        return found

    def _mig(self, parent: Any, device: Any) -> MigFacts:
        attributes = self._call("nvmlDeviceGetAttributes", device)
        gpu_instance = int(self._call("nvmlDeviceGetGpuInstanceId", device))
        try:  # placement needs a driver that lets us look at instances
            instance = self._call("nvmlDeviceGetGpuInstanceById", parent, gpu_instance)
            placement = self._call("nvmlGpuInstanceGetInfo", instance).placement
            start, size = int(placement.start), int(placement.size)
        except NvmlUnavailable:
            start, size = -1, 0
        return MigFacts(
            uuid=self.uuid(device),
            name=self.name(device),
            memory_bytes=int(attributes.memorySizeMB) << 20,
            compute_slices=int(attributes.computeInstanceSliceCount),
            gpu_instance=gpu_instance,
            compute_instance=int(self._call("nvmlDeviceGetComputeInstanceId", device)),
            start=start,
            size=size,
        )

    # --- how it does ----------------------------------------------------------------------------

    def uncorrected_errors(self, handle: Any) -> int:
        """Double-bit ECC errors since the driver was loaded."""
        kind = self.constant("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1)
        since = self.constant("NVML_VOLATILE_ECC")
        return int(self._call("nvmlDeviceGetTotalEccErrors", handle, kind, since))

    def remapped_rows(self, handle: Any) -> tuple[int, int, bool, bool]:
        """(corrected, uncorrected, pending, failed): row remapping of Ampere and later."""
        corrected, uncorrected, pending, failed = self._call("nvmlDeviceGetRemappedRows", handle)
        return int(corrected), int(uncorrected), bool(pending), bool(failed)

    def retired_pages_pending(self, handle: Any) -> bool:
        """Whether pages wait for a reset to be retired (before Ampere)."""
        return bool(self._call("nvmlDeviceGetRetiredPagesPendingStatus", handle))

    def temperature_c(self, handle: Any) -> int:
        """Of the die."""
        return int(self._call("nvmlDeviceGetTemperature", handle, 0))

    def power_mw(self, handle: Any) -> int:
        """Milliwatts, of the board."""
        return int(self._call("nvmlDeviceGetPowerUsage", handle))

    def processes(self, handle: Any) -> list[tuple[int, int]]:
        """(pid, bytes) of compute processes; bytes 0 where the driver does not say."""
        found = self._call("nvmlDeviceGetComputeRunningProcesses", handle)
        return [(int(one.pid), int(one.usedGpuMemory or 0)) for one in found]

    def watch_xids(self, handles: list[Any]) -> None:
        """From now on, `next_xid` tells of critical errors of these GPUs."""
        kind = self.constant("nvmlEventTypeXidCriticalError", 8)
        self._events = self._call("nvmlEventSetCreate")
        for handle in handles:
            self._call("nvmlDeviceRegisterEvents", handle, kind, self._events)

    def next_xid(self) -> tuple[str, int] | None:
        """(uuid, Xid) of the next critical error that was seen, without waiting."""
        if self._events is None:
            return None
        try:
            data = self._call("nvmlEventSetWait", self._events, 0)
        except NvmlUnavailable as error:
            if error.code == self.constant("NVML_ERROR_TIMEOUT", 10):
                return None
            raise
        return self.uuid(data.device), int(data.eventData)


def connect_nvml() -> Nvml:
    """Load and initialise the driver's library. Raises NvmlUnavailable."""
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailable(f"no NVML binding: {error}") from error
    nvml = Nvml(pynvml)
    nvml.open()
    return nvml
