"""Attacks 48 and 49 without a GPU: two other character devices stand in for two GPUs.

Everything from the assignment to the open() inside the job is as with a GPU; only what is behind
the device nodes differs. The same with a real one: `test_gpu_real.py`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace

from idl.control import AssignIntent
from idl.jobs import JobSpec, Resources
from idl.topology import GpuShare
from node_agent.core.gpus import GpuDevices
from node_agent.core.results import plan_of
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings

pytestmark = pytest.mark.root
# /dev/kmsg for writing, and autofs: anybody may open them, and no job has them.
STAND_INS: Final = ((1, 11), (10, 235))
PATHS: Final = tuple(f"/dev/outrider-test-{os.getpid()}-{n}" for n in range(2))
DEVICES: Final = GpuDevices({n: ((path,), f"GPU-{n}") for n, path in enumerate(PATHS)}, ())

TRIES: Final = """
echo "cuda=$CUDA_VISIBLE_DEVICES nvidia=$NVIDIA_VISIBLE_DEVICES"
for path in "$@"; do
    if (exec 3>>"$path") 2>/dev/null; then echo opened; else echo no; fi
done
mknod /work/again c 1 11 2>/dev/null && echo made || echo "not made"
ls /dev | grep -c outrider-test
"""


@pytest.fixture
async def sandbox() -> AsyncIterator[NativeSandbox]:
    if os.geteuid() != 0:
        pytest.skip("needs root: to make device nodes")
    try:
        for path, numbers in zip(PATHS, STAND_INS, strict=True):
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(*numbers))
            Path(path).chmod(0o666)
            os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"no stand-in for a GPU can be opened here: {error}")
    try:
        settings = SandboxSettings(instance=f"stand-in-{os.getpid()}", devices=DEVICES.paths)
        started = await NativeSandbox.start(settings)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    else:
        yield started
        await started.close()
    finally:
        for path in PATHS:
            Path(path).unlink(missing_ok=True)


async def tried(
    sandbox: NativeSandbox, gpus: tuple[int, ...] = (), share: GpuShare | None = None
) -> list[str]:
    spec = JobSpec(
        command=("/bin/sh", "-c", TRIES, "sh", *PATHS),
        env={"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "all"},
        resources=Resources(gpus=len(gpus)),
    )
    intent = AssignIntent(job="a", attempt=1, queue="q", spec=spec, gpus=gpus, share=share)
    plan = plan_of(intent, "n1", DEVICES)
    plan = replace(plan, require=plan.require & sandbox.enforcement.enforced)
    output: list[bytes] = []
    outcome = await sandbox.run(plan, b"", lambda _stream, data: output.append(data))
    assert outcome.exit_code is not None, outcome
    return b"".join(output).decode().splitlines()


async def test_only_the_assigned_device_is_there(sandbox: NativeSandbox) -> None:
    assert await tried(sandbox, (0,)) == [
        "cuda=GPU-0 nvidia=GPU-0", "opened", "no", "not made", "1",
    ]  # fmt: skip
    assert await tried(sandbox, (1,)) == [
        "cuda=GPU-1 nvidia=GPU-1", "no", "opened", "not made", "1",
    ]  # fmt: skip
    both = await tried(sandbox, (0, 1))
    assert both[1:3] == ["opened", "opened"] and both[-1] == "2"


async def test_a_job_without_a_gpu_has_none_whatever_its_variables_say(
    sandbox: NativeSandbox,
) -> None:
    assert await tried(sandbox) == ["cuda= nvidia=void", "no", "no", "not made", "0"]


async def test_a_share_is_the_device_of_its_gpu(sandbox: NativeSandbox) -> None:
    share = GpuShare(gpu=1, millis=250, memory_bytes=1 << 30)
    assert (await tried(sandbox, share=share))[:3] == ["cuda=GPU-1 nvidia=GPU-1", "no", "opened"]
