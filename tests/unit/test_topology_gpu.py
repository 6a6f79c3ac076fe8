"""GPUs through our NVML adapter: machines from public ``nvidia-smi topo -m`` reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from node_agent.topology.described import described_nvml, load_profile
from node_agent.topology.gpu import NVLINKS_MAX, GpuReport, normal_bus_id, read_gpus
from node_agent.topology.node import read_topology
from node_agent.topology.nvml import Nvml, NvmlUnavailable

NOT_SUPPORTED = 3
# Eight V100 as a hybrid cube mesh: NVLinks between each pair.
CUBE_MESH = (
    (0, 1, 2, 1, 0, 0, 0, 2),
    (1, 0, 1, 2, 0, 0, 2, 0),
    (2, 1, 0, 2, 0, 1, 0, 0),
    (1, 2, 2, 0, 1, 0, 0, 0),
    (0, 0, 0, 1, 0, 2, 2, 1),
    (0, 0, 1, 0, 2, 0, 1, 2),
    (0, 2, 0, 0, 2, 1, 0, 1),
    (2, 0, 0, 0, 1, 2, 1, 0),
)


def report_of(profile: str, **faults: Any) -> GpuReport:
    nvml = described_nvml(load_profile(profile), **faults)
    report = read_gpus(lambda: nvml)
    assert not nvml._nvml.is_open
    return report


def test_hybrid_cube_mesh() -> None:
    report = report_of("v100-cube-mesh")
    assert report.nvlinks == CUBE_MESH and report.reason == ""
    gpu = report.gpus[5]
    assert (gpu.index, gpu.minor, gpu.architecture) == (5, 5, "volta")
    assert gpu.uuid.startswith("GPU-") and gpu.cuda_compute_capability == "7.0"
    assert gpu.memory_bytes == 32 << 30 and report.driver_version == "570.86.15"
    assert gpu.cpus == "24-47,72-95" and gpu.compute_mode == "default" and gpu.ecc
    assert len({one.uuid for one in report.gpus}) == 8


@pytest.mark.parametrize(
    ("profile", "links"),
    [("dgx-a100", 12), ("a100-two-socket", 12), ("hgx-h100", 18), ("dgx-2", 6), ("gb200", 18)],
)
def test_behind_nvswitch_every_pair_is_equal(profile: str, links: int) -> None:
    report = report_of(profile)
    size = len(report.gpus)
    for a in range(size):
        assert report.nvlinks[a] == tuple(0 if a == b else links for b in range(size))
    assert links <= NVLINKS_MAX


@pytest.mark.parametrize("profile", ["l40s-pcie", "t4-pcie", "workstation-5090"])
def test_pcie_machines_have_no_links(profile: str) -> None:
    assert not any(map(any, report_of(profile).nvlinks))


def test_mig_instances_have_their_profile_memory_and_place() -> None:
    (gpu,) = report_of("a100-mig").gpus
    assert gpu.mig_mode
    assert [(m.profile, m.start, m.size, m.compute_slices) for m in gpu.mig] == [
        ("3g.20gb", 4, 4, 3), ("2g.10gb", 2, 2, 2), ("1g.5gb", 0, 1, 1), ("1g.5gb", 1, 1, 1),
    ]  # fmt: skip
    assert {m.parent_uuid for m in gpu.mig} == {gpu.uuid}
    assert sum(m.memory_bytes for m in gpu.mig) <= gpu.memory_bytes
    assert all(m.uuid.startswith("MIG-") for m in gpu.mig)
    no_place = report_of("a100-mig", broken={"nvmlDeviceGetGpuInstanceById": NOT_SUPPORTED})
    assert [m.start for m in no_place.gpus[0].mig] == [-1] * 4, "one field is lost, not the part"


def test_no_driver_is_a_reason_not_an_error() -> None:
    def connect() -> Nvml:
        raise NvmlUnavailable("driver not loaded")

    assert read_gpus(connect) == GpuReport(reason="driver not loaded")
    broken = report_of("v100-cube-mesh", broken={"nvmlDeviceGetCount": 999})
    assert broken.gpus == () and broken.reason == "nvmlDeviceGetCount: error 999"


@pytest.mark.parametrize(
    ("query", "field", "otherwise"),
    [
        ("nvmlDeviceGetMemoryInfo", "memory_bytes", 0),
        ("nvmlDeviceGetMinorNumber", "minor", -1),
        ("nvmlDeviceGetName", "product_name", ""),
        ("nvmlDeviceGetArchitecture", "architecture", ""),
        ("nvmlDeviceGetCudaComputeCapability", "cuda_compute_capability", ""),
        ("nvmlDeviceGetPciInfo", "pcie_bus_id", ""),
        ("nvmlDeviceGetCpuAffinityWithinScope", "cpus", ""),
        ("nvmlDeviceGetComputeMode", "compute_mode", ""),
        ("nvmlDeviceGetPersistenceMode", "persistence", False),
        ("nvmlDeviceGetEccMode", "ecc", False),
        ("nvmlDeviceGetMigMode", "mig_mode", False),
    ],
)
def test_one_broken_query_loses_one_field(query: str, field: str, otherwise: object) -> None:
    whole = report_of("dgx-a100")
    report = report_of("dgx-a100", broken={query: NOT_SUPPORTED})
    assert [getattr(gpu, field) for gpu in report.gpus] == [otherwise] * 8
    for gpu, other in zip(report.gpus, whole.gpus, strict=True):
        names = set(gpu.__struct_fields__) - {field}
        assert all(getattr(gpu, name) == getattr(other, name) for name in names)
    assert report.driver_version == whole.driver_version and report.pcie == whole.pcie


def test_a_gpu_that_fell_off_the_bus_is_listed_with_the_reason() -> None:
    report = report_of("hgx-h100", lost=frozenset({3}))
    assert [bool(gpu.unhealthy) for gpu in report.gpus] == [i == 3 for i in range(8)]
    assert "GPU is lost" in report.gpus[3].unhealthy
    assert report.nvlinks[3] == (0,) * 8 and report.nvlinks[0][1] == 18


def test_without_the_driver_s_levels_sysfs_gives_the_same() -> None:
    from tests.unit.machines import machine

    for profile in ("dgx-a100", "dgx-2", "l40s-pcie", "workstation-5090", "v100-cube-mesh"):
        assert report_of(profile, broken={"nvmlDeviceGetTopologyCommonAncestor": 3}).pcie == ()
        assert machine(profile).parts.pcie == report_of(profile).pcie


def test_numa_node_falls_back_to_sysfs(tmp_path: Path) -> None:
    described = load_profile("v100-cube-mesh")
    nvml = described_nvml(described, broken={"nvmlDeviceGetCpuAffinityWithinScope": 3})
    bus_id = normal_bus_id(nvml.pci_bus_id(2))
    device = tmp_path / "sys/bus/pci/devices" / bus_id
    device.mkdir(parents=True)
    (device / "numa_node").write_text("0\n")
    node = read_topology(
        sysfs=tmp_path / "sys",
        proc=tmp_path / "proc",
        affinity=frozenset({0}),
        connect=lambda: nvml,
    )
    assert [gpu.numa_node for gpu in node.gpus[:4]] == [-1, -1, 0, -1]
    assert node.nvlinks == CUBE_MESH


def test_bus_ids_of_nvml_and_sysfs_meet() -> None:
    assert normal_bus_id("00000000:17:00.0") == normal_bus_id("0000:17:00.0") == "0000:17:00.0"
    assert normal_bus_id("00010000:0B:00.0") == "10000:0b:00.0"


def test_the_adapter_turns_driver_errors_and_missing_calls_into_reasons() -> None:
    class Module:
        class NVMLError(Exception):
            pass

        @staticmethod
        def nvmlDeviceGetCount() -> int:
            raise Module.NVMLError("Driver Not Loaded")

    adapter = Nvml(Module)
    for query in (adapter.count, adapter.driver_version):
        with pytest.raises(NvmlUnavailable, match="nvml"):
            query()


def test_every_function_we_call_is_one_of_the_binding() -> None:
    """The described driver stands in for pynvml: it must not invent functions."""
    import pynvml

    from node_agent.topology.described_nvml import DescribedDriver

    ours = [name for name in dir(DescribedDriver) if name.startswith(("nvml", "NVML"))]
    assert len(ours) > 30
    assert not [name for name in ours if not hasattr(pynvml, name)]
    for name in (n for n in ours if n.isupper() and n != "NVMLError"):
        assert getattr(pynvml, name) == getattr(DescribedDriver, name), name
