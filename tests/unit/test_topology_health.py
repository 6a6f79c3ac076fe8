"""GPUs fall ill and get well, through the described driver."""

from typing import Any

import pytest

from idl.control import NodeReport
from idl.ledger import Capacity
from node_agent.report import whole_gpus, with_health
from node_agent.topology.described import described_nvml, load_profile
from node_agent.topology.gpu import read_gpus
from node_agent.topology.health import HealthWatch
from node_agent.topology.nvml import Nvml, NvmlUnavailable
from tests.unit.machines import machine

PROFILE = "dgx-a100"
UUIDS = tuple(gpu.uuid for gpu in machine(PROFILE).gpus)


def watch(**faults: Any) -> HealthWatch:
    return HealthWatch(lambda: described_nvml(load_profile(PROFILE), **faults), UUIDS)


def test_all_is_well() -> None:
    healthy = watch(processes={2: [(100, 1 << 30), (101, 2 << 30)]})
    assert healthy.look() == {}
    reading = healthy.readings[UUIDS[2]]
    assert (reading.processes, reading.memory_used_bytes) == (2, 3 << 30)
    assert (reading.temperature_c, reading.power_mw) == (35, 60_000)
    assert reading.uncorrected_errors == 0


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"lost": frozenset({5})}, "lost: nvmlDeviceGetHandleByUUID: GPU is lost"),
        ({"uncorrected": {5: 2}}, "2 uncorrectable memory errors since the driver was loaded"),
        ({"xids": [(1, 31), (5, 79)]}, "critical error: Xid 79"),
    ],
)
def test_one_is_ill_and_the_others_are_not(faults: dict[str, Any], reason: str) -> None:
    found = watch(**faults).look()
    assert found.keys() == {UUIDS[5]}
    assert found[UUIDS[5]].startswith(reason)


def test_an_xid_is_remembered_and_a_job_s_own_is_not() -> None:
    ill = watch(xids=[(0, 13), (0, 43), (3, 48)])
    assert ill.look().keys() == {UUIDS[3]}
    assert ill.look().keys() == {UUIDS[3]}, "no new event, and still not repaired"


def test_questions_that_the_driver_does_not_know_are_no_illness() -> None:
    broken = dict.fromkeys(
        ("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetRemappedRows", "nvmlDeviceGetTemperature",
         "nvmlDeviceGetPowerUsage", "nvmlEventSetCreate", "nvmlDeviceGetComputeRunningProcesses"),
        3,
    )  # fmt: skip
    quiet = watch(broken=broken)
    assert quiet.look() == {}
    assert quiet.readings[UUIDS[0]].temperature_c is None


def test_a_driver_that_is_gone_takes_all_and_comes_back() -> None:
    there = False

    def connect() -> Nvml:
        if not there:
            raise NvmlUnavailable("nvmlInit: Driver Not Loaded")
        return described_nvml(load_profile(PROFILE))

    watched = HealthWatch(connect, UUIDS)
    assert set(watched.look().values()) == {
        "the driver does not answer: nvmlInit: Driver Not Loaded"
    }
    there = True
    assert watched.look() == {}


def test_an_ill_gpu_leaves_the_capacity_and_returns() -> None:
    parts = machine(PROFILE).parts
    report = NodeReport(
        pool="p", node="n", incarnation=1, enforces=(), topology=parts,
        capacity=Capacity(cpu_millis=1, memory_bytes=1, gpus=whole_gpus(parts)),
    )  # fmt: skip
    ill = with_health(report, {UUIDS[4]: "lost"})
    assert ill.capacity.gpus == (0, 1, 2, 3, 5, 6, 7)
    assert ill.topology.gpus[4].unhealthy == "lost"
    assert with_health(ill, {}) == report


def test_a_lost_gpu_at_the_start_is_not_offered() -> None:
    found = read_gpus(lambda: described_nvml(load_profile(PROFILE), lost=frozenset({0})))
    assert [bool(gpu.unhealthy) for gpu in found.gpus] == [True, *[False] * 7]
