"""Plans, settings and the claim of what is enforced."""

from __future__ import annotations

from typing import Any

import pytest

from node_agent.sandbox import settings as settings_module
from node_agent.sandbox.plan import Limit, LimitNotEnforced, SandboxPlan, plan_problem
from node_agent.sandbox.protocol import Hello, enforcement
from node_agent.sandbox.settings import SandboxSettings


def plan(**fields: Any) -> SandboxPlan:
    return SandboxPlan(**({"key": "j.1", "argv": ("true",)} | fields))


def test_a_plain_plan_is_fine_and_requires_every_limit() -> None:
    assert plan_problem(plan()) is None
    assert plan().require == frozenset(Limit)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"key": ""}, "key"),
        ({"argv": ()}, "argv"),
        ({"argv": ("",)}, "argv"),
        ({"wall_ms": 0}, "wall_ms"),
        ({"pids_max": 0}, "pids_max"),
        ({"memory_bytes": 1}, "memory_bytes"),
        ({"cpu_millis": 1}, "cpu_millis"),
        ({"grace_ms": -1}, "grace_ms"),
        ({"grace_ms": 10**9}, "grace_ms"),
        ({"stdout_bytes_max": -1}, "caps"),
        ({"cwd": "work"}, "cwd"),
        ({"network": "host"}, "contradicts"),
        ({"argv": ("a\0b",)}, "NUL"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"hostname": ""}, "hostname"),
        ({"hostname": "x" * 65}, "hostname"),
        ({"argv": ("true", "x" * 100_000)}, "stdin"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], word: str) -> None:
    problem = plan_problem(plan(**fields))
    assert problem is not None and word in problem


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"extra_ro_paths": ("relative",)}, "relative"),
        ({"hidden_paths": ("/usr/../etc",)}, "normalized"),
        ({"visible_paths": ("/",)}, "not /"),
        ({"devices": ("/etc/passwd",)}, "/dev"),
        ({"instance": "a/b"}, "instance"),
        ({"jobs_max": 0}, "jobs_max"),
    ],
)
def test_settings_that_cannot_be_meant(fields: dict[str, Any], word: str) -> None:
    problem = settings_module.problem(SandboxSettings(**fields))
    assert problem is not None and word in problem
    assert settings_module.problem(SandboxSettings()) is None


UNASKED = {Limit.CPU_TIME, Limit.IO, Limit.CPUSET}


def hello(**fields: Any) -> Hello:
    defaults: dict[str, Any] = {
        "mode": "userns",
        "cgroup": "none",
        "holds": [],
        "cgroup_problems": ["cgroup memory: Permission denied"],
        "probe_cause": "exited",
        "probe_detail": "",
        "loose": 0,
        "loose_bits": {"pids": 1, "network": 2, "filesystem": 4, "seccomp": 8},
        "landlock_abi": 7,
        "device_filter": "none",
        "notes": [],
    }
    return Hello(**(defaults | fields))


def test_without_cgroups_memory_and_cpu_are_missing_with_the_reason() -> None:
    held = enforcement(hello())
    assert set(held.missing) - UNASKED == {Limit.MEMORY, Limit.CPU}
    assert "Permission denied" in held.missing[Limit.MEMORY]
    assert Limit.PIDS in held.enforced


def test_what_the_self_test_found_loose_is_missing() -> None:
    held = enforcement(hello(loose=1 | 8, holds=["memory", "cpu", "pids"], cgroup="v2"))
    assert set(held.missing) - UNASKED == {Limit.PIDS, Limit.SECCOMP}
    assert not held.seccomp


def test_the_refusal_says_which_and_why() -> None:
    error = LimitNotEnforced({Limit.MEMORY: "no cgroup"})
    assert "memory: no cgroup" in str(error)
