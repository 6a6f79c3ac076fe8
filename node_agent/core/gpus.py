"""Which device nodes and which environment an attempt gets for the GPUs reserved for it. Pure.

The sandbox enforces the device nodes (eBPF or the v1 device list); the environment is a courtesy
to CUDA, which would otherwise look for GPUs that the sandbox does not have.
"""

from collections.abc import Iterable, Mapping
from typing import Final

CONTROL_DEVICES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
"""Needed by every CUDA process besides its own GPU (facts: NVIDIA driver, major 195 and uvm)."""


class GpuDevices:
    """The node's GPUs by index: their device node and UUID. Built from what the driver reports."""

    def __init__(self, gpus: Mapping[int, tuple[str, str]], control: Iterable[str]) -> None:
        """`gpus`: index → (device path, UUID). `control`: the control devices that exist here."""
        self._gpus = dict(gpus)
        self._control = tuple(control)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every device that any attempt here may be given."""
        if not self._gpus:
            return ()
        return (*self._control, *(path for path, _ in self._gpus.values()))

    def of(self, reserved: tuple[int, ...]) -> tuple[str, ...]:
        """Device nodes for the reserved GPUs; none without a reservation."""
        if not reserved:
            return ()
        return (*self._control, *(self._gpus[index][0] for index in reserved))

    def environment(self, reserved: tuple[int, ...]) -> dict[str, str]:
        """CUDA_VISIBLE_DEVICES by UUID; empty (none) for an attempt without GPUs."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[index][1] for index in reserved)}


NO_GPUS: Final = GpuDevices({}, ())
