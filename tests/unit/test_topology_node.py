"""CPU, NUMA and memory from folders that look like sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idl.topology import format_cpu_list, parse_cpu_list
from node_agent.report import Offer, offered
from node_agent.topology.cpu import Core, meminfo_bytes, memory_limit_bytes
from node_agent.topology.node import NodeTopology, read_topology
from node_agent.topology.nvml import Nvml, NvmlUnavailable

GIB = 1 << 30


def no_driver() -> Nvml:
    raise NvmlUnavailable("NVML shared library not found")


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def machine(root: Path, packages: int, cores: int, threads: int, *, numa: bool = True) -> None:
    """Cores numbered across packages first, sibling threads after all cores, as Linux does."""
    physical = packages * cores
    put(root, "sys/devices/system/cpu/online", f"0-{physical * threads - 1}")
    for cpu in range(physical * threads):
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        put(root, f"{folder}/physical_package_id", str(cpu % physical // cores))
        put(root, f"{folder}/core_id", str(cpu % physical % cores))
    put(root, "proc/meminfo", f"MemTotal: {packages * 64 * GIB // 1024} kB")
    if not numa:
        return
    put(root, "sys/devices/system/node/online", f"0-{packages - 1}" if packages > 1 else "0")
    for node in range(packages):
        cpus = [cpu for cpu in range(physical * threads) if cpu % physical // cores == node]
        folder = f"sys/devices/system/node/node{node}"
        put(root, f"{folder}/cpulist", format_cpu_list(cpus))
        put(root, f"{folder}/meminfo", f"Node {node} MemTotal: {64 * GIB // 1024} kB")
        distances = ["10" if other == node else "21" for other in range(packages)]
        put(root, f"{folder}/distance", " ".join(distances))


def read(root: Path, affinity: frozenset[int] = frozenset(range(512))) -> NodeTopology:
    return read_topology(
        sysfs=root / "sys", proc=root / "proc", affinity=affinity, connect=no_driver
    )


def test_two_sockets(tmp_path: Path) -> None:
    machine(tmp_path, packages=2, cores=4, threads=2)
    node = read(tmp_path)
    assert node.cpus_total == 16 and node.cpus == tuple(range(16))
    assert len(node.cores) == 8
    assert node.cores[0] == Core(package=0, core=0, cpus=(0, 8))
    assert [domain.cpus for domain in node.numa] == [
        (0, 1, 2, 3, 8, 9, 10, 11),
        (4, 5, 6, 7, 12, 13, 14, 15),
    ]
    assert [domain.distances for domain in node.numa] == [(10, 21), (21, 10)]
    assert [domain.memory_bytes for domain in node.numa] == [64 * GIB, 64 * GIB]
    assert node.memory_bytes == node.memory_total_bytes == 128 * GIB
    assert node.gpus == () and node.gpus_reason == "NVML shared library not found"


def test_one_socket_under_an_affinity_mask(tmp_path: Path) -> None:
    machine(tmp_path, packages=1, cores=4, threads=1)
    node = read(tmp_path, frozenset({1, 2}))
    assert (node.cpus_total, node.cpus) == (4, (1, 2))
    assert [domain.cpus for domain in node.numa] == [(1, 2)]


def test_no_numa_folder_is_one_domain(tmp_path: Path) -> None:
    machine(tmp_path, packages=1, cores=2, threads=1, numa=False)
    (domain,) = read(tmp_path).numa
    assert (domain.id, domain.cpus, domain.distances) == (0, (0, 1), (10,))
    assert domain.memory_bytes == 64 * GIB


def test_an_empty_tree_still_answers(tmp_path: Path) -> None:
    node = read(tmp_path, frozenset({0, 1}))
    assert node.cpus == (0, 1) and len(node.cores) == 2
    assert node.memory_bytes == 0


def test_a_memory_domain_without_cpus_is_kept(tmp_path: Path) -> None:
    machine(tmp_path, packages=1, cores=2, threads=1)
    put(tmp_path, "sys/devices/system/node/online", "0-1")
    put(tmp_path, "sys/devices/system/node/node1/cpulist", "")
    put(tmp_path, "sys/devices/system/node/node1/meminfo", f"Node 1 MemTotal: {GIB // 1024} kB")
    put(tmp_path, "sys/devices/system/node/node1/distance", "17 10")
    assert [(d.id, d.cpus) for d in read(tmp_path).numa] == [(0, (0, 1)), (1, ())]


@pytest.mark.parametrize(
    ("cgroup", "limit_file", "text"),
    [
        ("0::/a/b", "sys/fs/cgroup/a/memory.max", str(2 * GIB)),
        ("0::/a/b", "sys/fs/cgroup/a/b/memory.max", str(2 * GIB)),
        ("4:memory:/x", "sys/fs/cgroup/memory/x/memory.limit_in_bytes", str(2 * GIB)),
    ],
)
def test_a_cgroup_limit_anywhere_above_us_counts(
    tmp_path: Path, cgroup: str, limit_file: str, text: str
) -> None:
    machine(tmp_path, packages=1, cores=2, threads=1)
    put(tmp_path, "proc/self/cgroup", cgroup)
    put(tmp_path, limit_file, text)
    node = read(tmp_path)
    assert (node.memory_bytes, node.memory_total_bytes) == (2 * GIB, 64 * GIB)


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("cgroup", "files", "millis"),
    [
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1500),
        ("0::/", {"sys/fs/cgroup/cpu.max": "25000 100000"}, 250),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/cpu.max": "5 10"}, 500),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "900000 100000"}, 4000),
        (
            "2:cpuacct,cpu:/x",
            {f"{V1}/x/cpu.cfs_quota_us": "50000", f"{V1}/x/cpu.cfs_period_us": "100000"},
            500,
        ),
        (
            "2:cpu,cpuacct:/",
            {f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"},
            4000,
        ),
        ("2:memory:/x", {f"{V1}/x/cpu.cfs_quota_us": "5", f"{V1}/x/cpu.cfs_period_us": "9"}, 4000),
    ],
)
def test_a_quota_anywhere_above_us_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], millis: int
) -> None:
    machine(tmp_path, packages=1, cores=4, threads=1)
    put(tmp_path, "proc/self/cgroup", cgroup)
    for name, text in files.items():
        put(tmp_path, name, text)
    node = read(tmp_path)
    assert (node.cpu_millis, len(node.cpus)) == (millis, 4)
    pinned = bool(offered(node, Offer()).numa[0].cores)
    assert pinned is (millis == 4000), "whole cores are not ours with a quota"
    told = offered(node, Offer(cpu_millis=4000))
    assert told.numa[0].cores, "who offers all of them knows better"


def test_names_of_cgroups_may_be_any_bytes(tmp_path: Path) -> None:
    machine(tmp_path, packages=1, cores=2, threads=1)
    put(tmp_path, "proc/self/cgroup", "")
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/a\xffb\xe2\x80\xa8c\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "1 2")
    assert read(tmp_path).cpu_millis == 500


def test_no_limit_is_no_limit() -> None:
    assert memory_limit_bytes(["max", "9223372036854771712", ""]) is None
    assert memory_limit_bytes(["max", "4096", "8192"]) == 4096


def test_meminfo_of_a_machine_and_of_a_node() -> None:
    assert meminfo_bytes("MemFree: 1 kB\nMemTotal:  2 kB") == 2048
    assert meminfo_bytes("Node 3 MemTotal:   5 kB") == 5120
    assert meminfo_bytes("") == 0


@given(st.sets(st.integers(0, 1023)))
def test_cpu_lists_round_trip(cpus: set[int]) -> None:
    assert parse_cpu_list(format_cpu_list(cpus)) == tuple(sorted(cpus))


def test_this_machine_can_be_read() -> None:
    node = read_topology()
    assert node.cpus and node.memory_bytes > 0
    assert set(node.cpus) == {cpu for core in node.cores for cpu in core.cpus}
    assert len(node.nvlinks) == len(node.gpus)
