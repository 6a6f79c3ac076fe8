"""What a container runtime is told, and how its answers are read. No runtime is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node_agent.launcher.child import JobSpec
from node_agent.oci import config
from node_agent.oci.runtime import RuntimeUnusable, fault_of, find, numbers, version_of
from node_agent.sandbox.plan import MIB, SandboxPlan
from node_agent.sandbox.protocol import plan_message
from node_agent.sandbox.seccomp import oci_profile


def built(**fields: Any) -> dict[str, Any]:
    plan = SandboxPlan(key="k", argv=("/bin/true", "x"), env={"A": "b"}, **fields)
    places = config.Places(
        root="/r", work="/w", ids=(7, 8), disks=["8:0"], cgroup="/j1", processes_max=9,
        namespaces="/proc/5/ns", seccomp=oci_profile("x86_64"), masked=["/proc/keys"],
        devices=[config.Device(path="/dev/nvidia0", major=195, minor=0)], extra_mounts=[],
    )  # fmt: skip
    return config.build(JobSpec(json.loads(msgspec.json.encode(plan_message(plan)))), places)


def test_the_limits_of_the_plan_are_those_of_the_container() -> None:
    resources = built(
        memory_bytes=64 * MIB, swap_bytes=MIB, pids_max=9, cpu_millis=250, cpus=(0, 2), mems=(1,),
        io_read_bytes_per_s=5,
    )["linux"]["resources"]  # fmt: skip
    assert resources["memory"] == {"limit": 64 * MIB, "swap": 65 * MIB}
    assert resources["pids"] == {"limit": 9}
    assert resources["cpu"] == {"quota": 25_000, "period": 100_000, "cpus": "0,2", "mems": "1"}
    rate = {"major": 8, "minor": 0, "rate": 5}
    assert resources["blockIO"] == {"throttleReadBpsDevice": [rate]}


def test_the_process_has_nothing_but_its_uid() -> None:
    process = built()["process"]
    assert process["user"]["uid"] == 7 and process["user"]["additionalGids"] == []
    assert set(map(tuple, process["capabilities"].values())) == {()}
    assert process["noNewPrivileges"] and not process["terminal"]


def test_only_its_own_device_is_there_and_allowed() -> None:
    linux = built(devices=("/dev/nvidia0",))["linux"]
    assert [device["path"] for device in linux["devices"]] == ["/dev/nvidia0"]
    first, second = linux["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert (second["major"], second["minor"], second["access"]) == (195, 0, "rw")


def test_it_joins_the_namespaces_that_we_hold() -> None:
    kinds = {item["type"]: item.get("path") for item in built()["linux"]["namespaces"]}
    assert kinds["pid"] == "/proc/5/ns/pid" and kinds["network"] == "/proc/5/ns/net"
    assert {"mount", "ipc", "uts", "cgroup"} <= kinds.keys()
    assert "network" not in {n["type"] for n in built(network="host")["linux"]["namespaces"]}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_profile_refuses_what_the_native_filter_refuses(machine: str) -> None:
    profile: dict[str, Any] = oci_profile(machine)
    allowed = {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }
    assert {"read", "execve", "openat"} <= allowed
    assert not allowed & {
        "mount",
        "ptrace",
        "bpf",
        "unshare",
        "clone",
        "clone3",
        "socket",
        "mknodat",
    }
    assert profile["defaultErrnoRet"] == 38


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("executable file `nope` not found in $PATH", 127),
        ('exec: \\"/nope\\": stat /nope: no such file or directory', 127),
        ("open executable: Permission denied", 126),
        ("creating process: failed to load /etc/passwd: permission denied", 126),
        ("executable file `/a\u2028b\x85c` not found in $PATH", 127),
        ("open executable: File name too long", 127),
        (f'exec: \\"/{"x" * 100_000}\\": stat /{"x" * 100_000}: file name too long', 127),
        ("cannot set memory limit", 0),
    ],
)
def test_whose_fault_a_failed_start_is(message: str, code: int) -> None:
    log = f'{{"msg":"{message}","level":"error"}}\n'
    fault = fault_of(log)
    assert fault is not None and fault.exit_code == code
    assert len(fault.text) < 5000
    assert fault_of('{"level":"warning","msg":"x"}\ncut off') is None


def test_versions() -> None:
    assert version_of("crun version 1.8.1\ncommit: f") == "1.8.1"
    assert numbers(version_of("runc version 1.1.5+ds1")) == (1, 1, 5)
    assert numbers(version_of("runsc version release-20240101.0")) == (20240101, 0)


def test_an_absent_and_an_old_runtime_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnusable, match="apt-get install crun") as absent:
        find("crun", str(tmp_path / "crun"))
    assert "\n" not in str(absent.value)
    old = tmp_path / "runc"
    old.write_text("#!/bin/sh\necho runc version 1.0.3\n")
    old.chmod(0o755)
    with pytest.raises(RuntimeUnusable, match=r"is version 1\.0\.3, at least 1\.1"):
        find("runc", str(old))
    old.write_text("#!/bin/sh\necho runc version 1.1.5+ds1\n")
    assert "1.2.8" in find("runc", str(old)).note
