"""On a machine with an NVIDIA GPU: NVML is read, CUDA starts in the sandbox, other devices do not.

Skipped with the driver's own words elsewhere. `pytest -m gpu tests/integration/test_gpu_real.py`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Final

import pytest
from msgspec.structs import replace

from idl.control import AssignIntent
from idl.jobs import JobSpec, Limits, Resources
from idl.topology import PCIE_LEVELS
from idl.units import GIB
from node_agent.cdi import read_cdi
from node_agent.core.gpus import GpuDevices
from node_agent.core.results import plan_of
from node_agent.report import gpu_devices, with_devices
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxOutcome
from node_agent.sandbox.settings import SandboxSettings, interpreter, interpreter_paths
from node_agent.topology.health import HealthWatch
from node_agent.topology.node import NodeTopology, read_topology
from node_agent.topology.nvml import connect_nvml
from tests.integration.sandboxes import started_or_skip

pytestmark = pytest.mark.gpu

# cuInit, then the count; CUDA's own codes (100: no device).
CUDA: Final = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int(-1)
started = cuda.cuInit(0)
cuda.cuDeviceGetCount(ctypes.byref(count))
print(started, count.value)
"""
ALLOCATE: Final = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
def check(code):
    if code: raise SystemExit(f"CUDA error {code}")
device, context = ctypes.c_int(), ctypes.c_void_p()
check(cuda.cuInit(0)); check(cuda.cuDeviceGet(ctypes.byref(device), 0))
check(cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device))
memory = ctypes.c_uint64()
check(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1 << 20)))
check(cuda.cuMemsetD8_v2(memory, ctypes.c_ubyte(7), ctypes.c_size_t(1 << 20)))
back = (ctypes.c_ubyte * 16)()
check(cuda.cuMemcpyDtoH_v2(back, memory, ctypes.c_size_t(16)))
print(bytes(back).hex())
"""
DENIED: Final = """
import errno, os, sys
for path in sys.argv[1:]:
    try: os.close(os.open(path, os.O_RDWR)); print("opened", path)
    except OSError as error: print(errno.errorcode[error.errno], end=" ")
try: os.mknod("/work/node", 0o20666, os.makedev(195, 0)); print("made")
except OSError as error: print(errno.errorcode[error.errno])
"""


@pytest.fixture(scope="module")
def machine() -> NodeTopology:
    found = read_topology()
    if not found.gpus:
        pytest.skip(f"no NVIDIA GPU here: {found.gpus_reason}")
    return found


@pytest.fixture(scope="module")
def devices(machine: NodeTopology) -> GpuDevices:
    return gpu_devices(machine.parts, read_cdi(machine.parts))


@pytest.fixture
async def sandbox(devices: GpuDevices) -> AsyncIterator[NativeSandbox]:
    settings = SandboxSettings(
        instance=f"gpu-test-{os.getpid()}", devices=devices.paths,
        extra_ro_paths=interpreter_paths(),
    )  # fmt: skip
    started = await started_or_skip(settings)
    yield started
    await started.close()


def test_nvml_tells_everything_that_placement_needs(machine: NodeTopology) -> None:
    parts = machine.parts
    for gpu in parts.gpus:
        assert gpu.uuid.startswith("GPU-") and gpu.product_name and gpu.architecture
        assert gpu.memory_bytes > GIB or gpu.mig_mode
        assert gpu.minor >= 0 and gpu.pcie_bus_id.count(":") == 2
        assert gpu.compute_mode and gpu.cpus and not gpu.unhealthy
    size = len(parts.gpus)
    assert [len(row) for row in parts.nvlinks] == [size] * size
    assert {level for row in parts.pcie for level in row} <= PCIE_LEVELS.keys()
    assert parts.driver_version


def test_gpus_are_well_and_readings_come(machine: NodeTopology) -> None:
    uuids = tuple(gpu.uuid for gpu in machine.gpus)
    watch = HealthWatch(connect_nvml, uuids)
    assert watch.look() == {}
    assert watch.readings.keys() == set(uuids)
    assert all(reading.temperature_c for reading in watch.readings.values())
    watch.close()


def test_a_gpu_whose_device_node_is_here_is_offered(
    machine: NodeTopology, devices: GpuDevices
) -> None:
    seen = with_devices(machine.parts, devices)
    assert any(not gpu.unhealthy for gpu in seen.gpus)


async def run(
    sandbox: NativeSandbox, devices: GpuDevices, gpus: tuple[int, ...], script: str,
    *words: str, **env: str,
) -> tuple[SandboxOutcome, str]:  # fmt: skip
    spec = JobSpec(
        command=(interpreter(), "-c", script, *words), env=env,
        resources=Resources(gpus=len(gpus), cpu_millis=2000, memory_bytes=4 * GIB),
        limits=Limits(wall_ms=60_000),
    )  # fmt: skip
    assign = AssignIntent(job="gpu", attempt=1, queue="q", spec=spec, gpus=gpus)
    plan = plan_of(assign, "n1", devices)
    plan = replace(plan, require=plan.require & sandbox.enforcement.enforced)
    output: list[bytes] = []
    outcome = await sandbox.run(plan, b"", lambda _stream, data: output.append(data))
    return outcome, b"".join(output).decode(errors="replace").strip()


def some_gpu(machine: NodeTopology, devices: GpuDevices) -> int:
    seen = with_devices(machine.parts, devices)
    fit = [gpu.index for gpu in seen.gpus if not gpu.unhealthy and not gpu.mig_mode]
    if not fit:
        pytest.skip("every GPU here is divided by MIG or without a device node")
    return fit[0]


async def test_cuda_starts_and_computes_with_the_gpu_that_was_given(
    sandbox: NativeSandbox, machine: NodeTopology, devices: GpuDevices
) -> None:
    gpu = some_gpu(machine, devices)
    outcome, said = await run(sandbox, devices, (gpu,), CUDA)
    assert said == "0 1", outcome
    outcome, said = await run(sandbox, devices, (gpu,), ALLOCATE)
    assert said == "07" * 16, outcome


async def test_a_job_without_a_gpu_has_none_whatever_it_says(
    sandbox: NativeSandbox, devices: GpuDevices
) -> None:
    """Attack 49: the variables are overridden; there is no device behind them."""
    for env in ({}, {"CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "all"}):
        _, said = await run(sandbox, devices, (), CUDA, **env)
        assert not said.startswith("0 "), said


async def test_unassigned_device_nodes_are_denied(
    sandbox: NativeSandbox, machine: NodeTopology, devices: GpuDevices
) -> None:
    """Attack 48: neither opened nor made."""
    outcome, said = await run(sandbox, devices, (), DENIED, *devices.paths)
    assert outcome.exit_code == 0, said
    assert set(said.split()[:-1]) <= {"ENOENT", "EPERM", "EACCES"}
    assert said.split()[-1] == "EPERM"
    given = some_gpu(machine, devices)
    others = [f"/dev/nvidia{gpu.minor}" for gpu in machine.gpus if gpu.index != given]
    outcome, said = await run(sandbox, devices, (given,), DENIED, *others)
    assert "opened" not in said, said
