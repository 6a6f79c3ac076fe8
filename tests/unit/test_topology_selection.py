"""Agents that share a machine: every GPU and core is offered by one of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idl.errors import ConfigError
from idl.topology import parse_cpu_list
from node_agent.report import Offer, offered
from node_agent.topology.described import load_profile, profile_names, read_described
from node_agent.topology.selection import select_cpus, select_gpus
from tests.unit.machines import machine

MESH = machine("v100-cube-mesh")


@given(st.integers(1, 12))
def test_the_parts_are_the_whole_and_nothing_twice(count: int) -> None:
    parts = [select_gpus(MESH.parts, f"{k}/{count}") for k in range(1, count + 1)]
    assert [gpu.index for part in parts for gpu in part.gpus] == list(range(8))
    cpus = [select_cpus(MESH.parts, f"{k}/{count}") for k in range(1, count + 1)]
    mine = [c for part in cpus for domain in part.numa for c in parse_cpu_list(domain.cpus)]
    assert sorted(mine) == list(range(96)) and len(set(mine)) == 96


def test_matrices_and_adapters_are_cut_along() -> None:
    part = select_gpus(MESH.parts, f"6,0,{MESH.gpus[2].uuid}")
    assert [gpu.index for gpu in part.gpus] == [0, 2, 6]
    assert part.nvlinks == ((0, 2, 0), (2, 0, 0), (0, 0, 0))
    assert part.pcie == ((0, 40, 50), (40, 0, 50), (50, 50, 0))
    assert part.nics[0].levels == (50, 50, 10)


def test_none_and_all() -> None:
    none = select_gpus(MESH.parts, "none")
    assert (none.gpus, none.nvlinks, none.gpu_note) == ((), (), "none is offered (--gpus none)")
    assert select_gpus(MESH.parts, "all") == MESH.parts == select_cpus(MESH.parts, "")


@pytest.mark.parametrize("words", ["8", "GPU-x", "0/2", "3/2"])
def test_what_is_not_here_is_one_line(words: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        select_gpus(MESH.parts, words)


def test_cpu_lists_are_cut_to_whole_cores() -> None:
    part = select_cpus(MESH.parts, "0-3,48-49,24")
    assert [domain.cores for domain in part.numa] == [((0, 48), (1, 49)), ()]
    with pytest.raises(ConfigError, match="not a CPU list"):
        select_cpus(MESH.parts, "zero")


def test_a_node_that_shares_its_cpus_pins_nobody_unless_told_which_are_its_own() -> None:
    shared = offered(MESH, Offer(cpu_millis=48_000, memory_bytes=MESH.memory_bytes // 2))
    assert [domain.cores for domain in shared.numa] == [(), ()]
    assert shared.numa[0].memory_bytes == MESH.numa[0].memory_bytes // 2
    told = offered(MESH, Offer(cpu_millis=48_000, cpus="1/2"))
    assert [len(domain.cores) for domain in told.numa] == [24, 0]
    assert [len(domain.cores) for domain in offered(MESH, Offer()).numa] == [24, 24]


def test_every_profile_can_be_played_and_a_wrong_name_is_told() -> None:
    assert set(profile_names()) >= {
        "dgx-a100", "a100-two-socket", "hgx-h100", "dgx-2", "v100-cube-mesh", "gb200", "l40s-pcie",
        "t4-pcie", "workstation-5090", "a100-mig",
    }  # fmt: skip
    for name in profile_names():
        found = load_profile(name)
        assert found.title and found.source and len(found.gpus.devices) >= 1
    with pytest.raises(ConfigError, match="did you mean 'hgx-h100'"):
        load_profile("hgx-h10")
    again = read_described(load_profile("a100-mig"), "a100-mig")
    assert again == machine("a100-mig"), "the same file gives the same machine, UUIDs too"
