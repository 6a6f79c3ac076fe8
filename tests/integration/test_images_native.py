"""Jobs in the root of an image, as root and as an ordinary user: what they see and cannot do."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxPlan
from node_agent.sandbox.settings import SandboxSettings
from tests.attacks.runner import leftovers
from tests.images import tiny_root
from tests.integration.sandboxes import started_or_skip

INSTANCE = f"images-{os.getpid()}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_root(tmp_path_factory.mktemp("image"))


@pytest.fixture(params=["auto", "userns"])
async def sandbox(image: Path, request: pytest.FixtureRequest) -> AsyncIterator[NativeSandbox]:
    started = await started_or_skip(
        SandboxSettings(instance=INSTANCE, mode=request.param, image_paths=(str(image),))
    )
    yield started
    await started.close()
    assert leftovers(INSTANCE) == []


async def shell(sandbox: NativeSandbox, script: str, **fields: Any) -> tuple[int | None, str]:
    """Exit code and stdout of a script in the image."""
    seen: list[bytes] = []
    plan = SandboxPlan(
        key="a", argv=("/bin/sh", "-c", script), require=sandbox.enforcement.enforced,
        memory_bytes=64 * MIB, pids_max=32, **fields,
    )  # fmt: skip
    outcome = await sandbox.run(plan, b"in", lambda _, data: seen.append(data))
    assert outcome.cause == "exited", outcome
    return outcome.exit_code, b"".join(seen).decode()


async def test_a_job_sees_the_image_and_our_own_file_systems(
    sandbox: NativeSandbox, image: Path
) -> None:
    assert sandbox.enforcement.image_paths == (str(image),)
    script = (
        "ls / | cat; cat /etc/release; cat /etc/passwd; id -un; cat; echo x > /work/result;"
        "echo y > /tmp/y; echo z > /dev/shm/z; cat /proc/1/comm; head -c1 /dev/zero | cat"
    )
    code, text = await shell(sandbox, script, image=str(image))
    assert code == 0, text
    names, rest = text.split("tiny\n")
    assert set(names.split()) - {"lib", "lib64"} == {
        "bin", "dev", "etc", "proc", "sbin", "tmp", "usr", "work",
    }  # fmt: skip
    assert rest.startswith("root:x:0:0:root:/:/bin/sh\njob:x:1000:1000:job:/work:/bin/sh\njob\nin")
    assert (image / "etc/passwd").read_text() == "root:x:0:0:root:/:/bin/sh\n", "it was changed"
    code, text = await shell(sandbox, "ls -d /etc/release 2>&1; ls -d /etc/os-release")
    assert text.splitlines()[-1] == "/etc/os-release", "the host's root is as before"
    assert "No such" in text
