"""GPUs through a fake NVML: machines from public ``nvidia-smi topo -m`` reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from node_agent.topology.gpu import (
    NVLINKS_MAX,
    GpuReport,
    Nvml,
    NvmlUnavailable,
    PynvmlAdapter,
    normal_bus_id,
    read_gpus,
)
from node_agent.topology.node import read_topology

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


class FakeNvml:
    """A driver for a made-up machine. ``links[i]`` lists (remote type, remote bus id)."""

    def __init__(self, names: list[str], links: list[list[tuple[int, str]]], **broken: str) -> None:
        self._names, self._links, self._broken = names, links, broken
        self.closed = False

    def _answer(self, query: str, value: Any) -> Any:
        if query in self._broken:
            raise NvmlUnavailable(self._broken[query])
        return value

    def driver_version(self) -> str:
        return str(self._answer("driver_version", "570.86.15"))

    def count(self) -> int:
        return int(self._answer("count", len(self._names)))

    def handle(self, index: int) -> Any:
        return index

    def uuid(self, handle: Any) -> str:
        return f"GPU-{int(handle):04d}"

    def name(self, handle: Any) -> str:
        return str(self._names[handle])

    def memory_bytes(self, handle: Any) -> int:
        return int(self._answer("memory_bytes", 32 << 30))

    def pci_bus_id(self, handle: Any) -> str:
        return f"0000{bus(handle).upper()}"

    def numa_node(self, handle: Any) -> int:
        return int(self._answer("numa_node", handle // 4))

    def minor(self, handle: Any) -> int:
        return int(self._answer("minor", handle))

    def compute_capability(self, handle: Any) -> tuple[int, int]:
        return (7, 0)

    def link_active(self, handle: Any, link: int) -> bool:
        return link < len(self._links[handle])

    def link_remote_type(self, handle: Any, link: int) -> int:
        return int(self._answer("link_remote_type", self._links[handle][link][0]))

    def link_remote_bus_id(self, handle: Any, link: int) -> str:
        return str(self._links[handle][link][1])

    def close(self) -> None:
        self.closed = True


def bus(index: int) -> str:
    return f"0000:{0x10 + index:02x}:00.0"


def cube_mesh(**broken: str) -> FakeNvml:
    links = [
        [(0, bus(other)) for other, count in enumerate(row) for _ in range(count)]
        for row in CUBE_MESH
    ]
    return FakeNvml(["Tesla V100-SXM2-32GB"] * 8, links, **broken)


def report_of(nvml: FakeNvml) -> GpuReport:
    report = read_gpus(lambda: nvml)
    assert nvml.closed
    return report


def test_hybrid_cube_mesh() -> None:
    report = report_of(cube_mesh())
    assert report.nvlinks == CUBE_MESH and report.reason == ""
    gpu = report.gpus[5]
    assert (gpu.index, gpu.uuid, gpu.minor, gpu.numa_node) == (5, "GPU-0005", 5, 1)
    assert gpu.pcie_bus_id == bus(5) and gpu.cuda_compute_capability == "7.0"
    assert gpu.memory_bytes == 32 << 30 and gpu.driver_version == "570.86.15"


def test_behind_nvswitch_every_pair_is_equal() -> None:
    links = [[(2, f"0000:a{switch % 4}:00.0") for switch in range(12)] for _ in range(8)]
    report = report_of(FakeNvml(["A100-SXM4-40GB"] * 8, links))
    for a in range(8):
        assert report.nvlinks[a] == tuple(0 if a == b else 12 for b in range(8))


def test_a_gpu_with_fewer_live_links_bounds_its_pairs() -> None:
    links = [[(2, "0000:a0:00.0")] * count for count in (18, 18, 9)]
    report = report_of(FakeNvml(["H100"] * 3, links))
    assert report.nvlinks == ((0, 18, 9), (18, 0, 9), (9, 9, 0))
    assert NVLINKS_MAX >= 18


def test_pcie_machine_has_no_links() -> None:
    report = report_of(FakeNvml(["L40S"] * 2, [[], []]))
    assert report.nvlinks == ((0, 0), (0, 0))


def test_no_driver_is_a_reason_not_an_error() -> None:
    def connect() -> Nvml:
        raise NvmlUnavailable("driver not loaded")

    assert read_gpus(connect) == GpuReport(reason="driver not loaded")
    broken = report_of(cube_mesh(count="driver hung"))
    assert broken.gpus == () and broken.reason == "driver hung"


def test_one_broken_query_loses_one_field() -> None:
    report = report_of(cube_mesh(memory_bytes="not supported", minor="not supported"))
    assert len(report.gpus) == 8
    assert report.gpus[0].memory_bytes == 0 and report.gpus[0].minor is None


def test_numa_node_falls_back_to_sysfs(tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices" / bus(2)
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    node = read_topology(
        sysfs=tmp_path / "sys",
        proc=tmp_path / "proc",
        affinity=frozenset({0}),
        connect=lambda: cube_mesh(numa_node="not supported"),
    )
    assert [gpu.numa_node for gpu in node.gpus[:4]] == [None, None, 1, None]
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

    adapter = PynvmlAdapter(Module)
    for query in (adapter.count, adapter.driver_version):
        try:
            query()
        except NvmlUnavailable as error:
            assert "nvml" in str(error)
        else:
            raise AssertionError("expected NvmlUnavailable")
