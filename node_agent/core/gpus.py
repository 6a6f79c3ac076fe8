"""Which device nodes and which environment an attempt gets for the GPUs reserved for it. Pure.

The sandbox enforces the device nodes (eBPF or the v1 device list); the environment is a courtesy
to CUDA, which would otherwise look for GPUs that the sandbox does not have.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from idl.control import AssignIntent
from idl.errors import PlatformFaultError
from idl.topology import GpuShare

CONTROL_DEVICES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
"""Needed by every CUDA process besides its own GPU (facts: NVIDIA driver, major 195 and uvm)."""
SIMULATED_VARIABLE: Final = "OUTRIDER_SIMULATED_GPUS"
"""UUIDs of the GPUs that a simulated node pretends to give: there is no device behind them."""


class GpuDevices:
    """The node's GPUs by index and MIG instances by UUID: their device nodes."""

    def __init__(
        self,
        gpus: Mapping[int, tuple[tuple[str, ...], str]],
        control: Iterable[str],
        mig: Mapping[str, tuple[str, ...]] | None = None,
        env: Mapping[int | str, Mapping[str, str]] | None = None,
        *,
        simulated: bool = False,
    ) -> None:
        """`gpus`: index → (device paths, UUID). `control`: the control devices that exist here.

        `mig`: UUID → the GPU's device and the two of its capabilities. `env`: what CDI adds for a
        GPU or instance. `simulated`: no device is ever given, whatever is reserved.
        """
        self._gpus = dict(gpus)
        self._mig = dict(mig or {})
        self._control = tuple(control)
        self._env = dict(env or {})
        self.simulated = simulated

    def has(self, which: int | str) -> bool:
        """Whether attempts can be given this GPU (index) or MIG instance (UUID)."""
        return which in self._gpus or which in self._mig

    @property
    def paths(self) -> tuple[str, ...]:
        """Every device that any attempt here may be given."""
        if self.simulated or not (self._gpus or self._mig):
            return ()
        whole = [path for paths, _ in self._gpus.values() for path in paths]
        parts = [path for paths in self._mig.values() for path in paths]
        return tuple(dict.fromkeys((*self._control, *whole, *parts)))

    def of(self, assign: AssignIntent) -> tuple[str, ...]:
        """Device nodes for what is reserved; none without a reservation.

        Raises PlatformFaultError where the node has no such device (any more).
        """
        if self.simulated:
            return ()
        whole = [path for index in _gpus_of(assign) for path in self._gpu(index)[0]]
        parts = [path for uuid in assign.mig for path in self._instance(uuid)]
        return tuple(dict.fromkeys((*self._control, *whole, *parts))) if whole or parts else ()

    def environment(self, assign: AssignIntent) -> dict[str, str]:
        """Visible devices by UUID; empty (none) for an attempt without GPUs. Raises as `of`."""
        indices = _gpus_of(assign)
        if self.simulated:
            known = [self._gpus[index][1] for index in indices if index in self._gpus]
            uuids = ",".join((*known, *assign.mig))
            pretended = {SIMULATED_VARIABLE: uuids} if uuids else {}
            return {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void", **pretended}
        uuids = ",".join((*(self._gpu(index)[1] for index in indices), *assign.mig))
        given: tuple[int | str, ...] = (*indices, *assign.mig)
        from_cdi = {
            name: value for device in given for name, value in self._env.get(device, {}).items()
        }
        visible = {"CUDA_VISIBLE_DEVICES": uuids, "NVIDIA_VISIBLE_DEVICES": uuids or "void"}
        return {**from_cdi, **visible, **_share_words(assign.share)}

    def _gpu(self, index: int) -> tuple[tuple[str, ...], str]:
        found = self._gpus.get(index)
        if found is None:
            raise PlatformFaultError(f"GPU {index} is not on this node any more", retryable=True)
        return found

    def _instance(self, uuid: str) -> tuple[str, ...]:
        found = self._mig.get(uuid)
        if found is None:
            raise PlatformFaultError(f"{uuid} is not on this node any more", retryable=True)
        return found


def _gpus_of(assign: AssignIntent) -> tuple[int, ...]:
    return assign.gpus if assign.share is None else (*assign.gpus, assign.share.gpu)


def _share_words(share: GpuShare | None) -> dict[str, str]:
    """Read by CUDA where the job is a client of MPS, by the job itself elsewhere."""
    if share is None:
        return {}
    return {
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={share.memory_bytes >> 20}M",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{max(share.millis // 10, 1)}",
        "OUTRIDER_GPU_SHARE_MEMORY_BYTES": str(share.memory_bytes),
        "OUTRIDER_GPU_SHARE_MILLIS": str(share.millis),
    }


NO_GPUS: Final = GpuDevices({}, ())
ALREADY_GIVEN: Final = GpuDevices({}, (), simulated=True)
"""For an attempt that runs: its devices are in its sandbox, whatever this node has by now."""
