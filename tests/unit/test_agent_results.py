"""Assign → sandbox plan, outcome → result record: pure mappings."""

import pytest

from idl.control import AssignIntent
from idl.jobs import Isolation, JobSpec, Limits, Resources
from node_agent.core.gpus import GpuDevices
from node_agent.core.results import outcome_of, plan_of, result_of
from node_agent.sandbox.plan import Limit, SandboxOutcome, plan_problem

GPUS = GpuDevices({i: ((f"/dev/nvidia{i}",), f"GPU-{i}") for i in range(4)}, ["/dev/nvidiactl"])


def assign(gpus: tuple[int, ...] = (), network: str = "none") -> AssignIntent:
    spec = JobSpec(
        id="a",
        command=("/bin/true", "x"),
        env={"A": "1", "OUTRIDER_ATTEMPT": "99", "PATH": "/opt"},
        resources=Resources(cpu_millis=500, memory_bytes=64 << 20, gpus=len(gpus)),
        limits=Limits(wall_ms=1234, pids_max=7),
        isolation=Isolation(network="host" if network == "host" else "none"),
    )
    return AssignIntent(job="a", attempt=2, queue="q", spec=spec, gpus=gpus)


UNASKED = {Limit.CPU_TIME, Limit.IO, Limit.CPUSET}


def test_a_plan_carries_every_limit_and_our_names_win() -> None:
    plan = plan_of(assign(), "n1", GPUS)
    assert plan_problem(plan) is None
    assert (plan.argv, plan.key) == (("/bin/true", "x"), "a.2")
    assert (plan.cpu_millis, plan.memory_bytes, plan.pids_max, plan.wall_ms) == (
        500, 64 << 20, 7, 1234,
    )  # fmt: skip
    assert plan.require == frozenset(Limit) - UNASKED
    assert plan.env["OUTRIDER_ATTEMPT"] == "2"
    assert plan.env["PATH"] == "/opt"
    assert plan.env["A"] == "1"


def test_asking_for_the_host_s_network_waives_only_that_limit() -> None:
    plan = plan_of(assign(network="host"), "n1")
    assert plan.require == frozenset(Limit) - {Limit.NETWORK} - UNASKED
    assert plan_problem(plan) is None


def test_only_the_reserved_gpus_are_reachable() -> None:
    plan = plan_of(assign(gpus=(1, 3)), "n1", GPUS)
    assert plan.devices == ("/dev/nvidiactl", "/dev/nvidia1", "/dev/nvidia3")
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-3"
    bare = plan_of(assign(), "n1", GPUS)
    assert bare.devices == ()
    assert bare.env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (SandboxOutcome(cause="exited", exit_code=0), "succeeded"),
        (SandboxOutcome(cause="exited", exit_code=1), "failed"),
        (SandboxOutcome(cause="exited", exit_code=None), "failed"),
        (SandboxOutcome(cause="signalled", signal=11), "signalled"),
        (SandboxOutcome(cause="timed_out"), "timed_out"),
        (SandboxOutcome(cause="out_of_memory"), "out_of_memory"),
        (SandboxOutcome(cause="killed"), "killed"),
        (SandboxOutcome(cause="sandbox_failed"), "platform"),
    ],
)
def test_every_outcome_has_its_name(outcome: SandboxOutcome, expected: str) -> None:
    assert outcome_of(outcome) == expected
    result = result_of(assign(), "n1", 4, outcome, "why")
    assert (result.job, result.attempt, result.term) == ("a", 2, 4)
    assert "why" in result.detail
