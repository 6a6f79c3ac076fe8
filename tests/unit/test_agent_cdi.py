"""CDI specs: what is applied, what is refused, what is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from idl.control import AssignIntent
from idl.errors import ConfigError, PlatformFaultError
from idl.jobs import JobSpec, Resources
from node_agent.cdi import read_cdi, read_specs
from node_agent.core.cdi import applied, parse_spec
from node_agent.core.gpus import ALREADY_GIVEN
from node_agent.report import gpu_devices, with_devices
from tests.unit.machines import machine

# As `nvidia-ctk cdi generate` writes it, shortened.
SPEC: dict[str, Any] = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"},
                                                         {"path": "/dev/dri/card1"}]}},
        {"name": "1", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia1"}]}},
    ],
    "containerEdits": {
        "env": ["NVIDIA_VISIBLE_DEVICES=void", "FROM_CDI=yes"],
        "deviceNodes": [{"path": "/dev/nvidiactl"}, {"path": "/dev/nvidia-uvm"}],
        "mounts": [
            {"hostPath": "/run/nvidia-persistenced/socket",
             "containerPath": "/run/nvidia-persistenced/socket", "options": ["ro", "bind"]},
            {"hostPath": "/usr/lib/libcuda.so.1", "containerPath": "/lib/elsewhere/libcuda.so.1"},
        ],
        "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook",
                   "args": ["nvidia-cdi-hook", "update-ldcache"]}],
    },
}  # fmt: skip
HOOK = "/usr/bin/nvidia-cdi-hook"


def test_device_and_container_edits_come_together() -> None:
    found = applied([parse_spec(SPEC, "x")], ["0", "GPU-a"])
    assert found is not None
    assert found.nodes == ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0", "/dev/dri/card1")
    assert found.env == {"NVIDIA_VISIBLE_DEVICES": "void", "FROM_CDI": "yes"}
    assert found.mounts == ("/run/nvidia-persistenced/socket",)
    assert found.hooks == ()
    assert found.notes == (
        "mount /usr/lib/libcuda.so.1 elsewhere (/lib/elsewhere/libcuda.so.1)",
        f"hook {HOOK} (createContainer) is not on the allow-list",
    )
    assert applied([parse_spec(SPEC, "x")], ["7"]) is None


def test_hooks_of_the_allow_list_are_handed_on() -> None:
    found = applied([parse_spec(SPEC, "x")], ["1"], frozenset({HOOK}))
    assert found is not None
    assert [hook.path for hook in found.hooks] == [HOOK]


@pytest.mark.parametrize("path", ["/dev/../etc/shadow", "/etc/shadow", "/dev/", "/dev//sda", "dev"])
def test_only_places_below_dev_are_device_nodes(path: str) -> None:
    spec = SPEC | {"containerEdits": {"deviceNodes": [{"path": path}]}}
    found = applied([parse_spec(spec, "x")], ["1"])
    assert found is not None
    assert path not in found.nodes and path in found.notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cdiVersion": "9.0"}, "version 9.0 is not known"),
        ({"kind": "gpu"}, "is not VENDOR/CLASS"),
        ({"devices": "all"}, r"Expected `array`, got `str` - at `\$.devices`"),
        ({"devices": [{"containerEdits": {}}]}, "missing required field `name`"),
    ],
)
def test_a_malformed_spec_is_one_clear_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_spec(SPEC | change, "/etc/cdi/nvidia.yaml")
    assert "/etc/cdi/nvidia.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_files_are_read_in_rising_priority_and_bad_ones_are_told(tmp_path: Path) -> None:
    low, high = tmp_path / "etc", tmp_path / "run"
    low.mkdir()
    high.mkdir()
    (low / "nvidia.json").write_text(json.dumps(SPEC))
    (low / "broken.yaml").write_text("devices: [")
    (low / "notes.txt").write_text("not a spec")
    (high / "open.json").write_text("{}")
    (high / "open.json").chmod(0o666)
    newer = SPEC | {"containerEdits": {"env": ["FROM=run"]}}
    (high / "nvidia.yaml").write_text(json.dumps(newer))
    specs, problems = read_specs([low, high, tmp_path / "absent"])
    assert [spec.container_edits.env[0] for spec in specs][-1] == "FROM=run"
    assert len(specs) == 2 and len(problems) == 2
    assert "broken.yaml is ignored" in problems[0]
    assert "open.json is ignored: others may write it" in problems[1]
    assert all("\n" not in problem for problem in problems)
    found = applied(specs, ["0"])
    assert found is not None and found.env == {"FROM": "run"}


def assign(*gpus: int) -> AssignIntent:
    spec = JobSpec(command=("true",), resources=Resources(gpus=len(gpus)))
    return AssignIntent(job="a", attempt=1, queue="q", spec=spec, gpus=gpus)


def test_a_gpu_known_to_a_spec_has_the_nodes_of_the_spec(tmp_path: Path) -> None:
    parts = machine("workstation-5090").parts
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/nvidia.json").write_text(json.dumps(SPEC))
    dev = tmp_path / "dev"
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "dri/card1"):
        (dev / name).parent.mkdir(parents=True, exist_ok=True)
        (dev / name).touch()
    parts = parts.__class__(numa=parts.numa, gpus=parts.gpus)  # a real one: no profile
    devices = gpu_devices(parts, read_cdi(parts, [tmp_path / "cdi"]), dev)
    assert set(devices.of(assign(0))) == {
        "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/dri/card1",
    }  # fmt: skip
    assert "/dev/nvidia0" not in devices.of(assign(1)), "only what is assigned"
    environment = devices.environment(assign(0))
    assert environment["FROM_CDI"] == "yes"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == parts.gpus[0].uuid, "ours, not the spec's"
    assert devices.environment(assign()) == {
        "CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void",
    }  # fmt: skip


def test_a_gpu_without_a_device_node_here_is_not_offered(tmp_path: Path) -> None:
    parts = machine("workstation-5090").parts
    parts = parts.__class__(numa=parts.numa, gpus=parts.gpus)
    (tmp_path / "nvidia1").touch()
    seen = with_devices(parts, gpu_devices(parts, None, tmp_path))
    assert [gpu.unhealthy for gpu in seen.gpus] == ["no device node /dev/nvidia0 here", ""]


def test_a_simulated_node_gives_no_device() -> None:
    devices = gpu_devices(machine("dgx-a100").parts)
    assert devices.paths == () and devices.of(assign(0, 1)) == ()
    environment = devices.environment(assign(0, 1))
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert len(environment["OUTRIDER_SIMULATED_GPUS"].split(",")) == 2


def test_a_device_that_is_gone_fails_the_attempt_and_not_the_agent() -> None:
    devices = gpu_devices(machine("workstation-5090").parts.__class__())
    with pytest.raises(PlatformFaultError, match="GPU 1 is not on this node any more"):
        devices.of(assign(1))
    assert ALREADY_GIVEN.of(assign(1)) == ()
