"""Jobs in the root of an image, as root and as an ordinary user: what they see and cannot do."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from node_agent.launcher.images import TOP_NAMES_MAX
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, PlanRefused, SandboxPlan, SandboxUnavailable
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


async def test_a_prepared_sandbox_of_an_image_serves_jobs_of_it_alone(
    sandbox: NativeSandbox, image: Path
) -> None:
    for number in range(6):
        for path, words in ((str(image), "tiny\n"), ("", "")):
            script = "cat /etc/release 2>/dev/null; ls -d /home 2>/dev/null; true"
            code, text = await shell(sandbox, script, image=path)
            assert (code, text) == (0, words), number


async def test_only_configured_paths_are_images(
    sandbox: NativeSandbox, image: Path, tmp_path: Path
) -> None:
    for wrong in (str(tmp_path), f"{image}x", f"{image}/../", "/"):
        with pytest.raises((SandboxUnavailable, PlanRefused)):
            await shell(sandbox, "true", image=wrong)
    (image / "link").unlink(missing_ok=True)
    (image / "link").symlink_to(tmp_path)
    plan = SandboxPlan(
        key="l", argv=("true",), image=f"{image}/link", require=sandbox.enforcement.enforced
    )
    outcome = await sandbox.run(plan, b"")
    assert outcome.cause == "sandbox_failed" and "ENOTDIR" in outcome.detail
    (image / "link").unlink()
    missing = await sandbox.run(replace(plan, image=f"{image}/usr/absent"), b"")
    assert missing.cause == "sandbox_failed" and "ENOENT" in missing.detail
    assert (await shell(sandbox, "true", image=str(image)))[0] == 0, "the launcher goes on"


async def test_roots_that_lack_everything_or_have_too_much(tmp_path: Path) -> None:
    bare, named, full = (tmp_path / name for name in ("bare", "named", "full"))
    for root in (bare, named, full):
        tiny_root(root)
    shutil.rmtree(bare / "etc")
    (named / "etc/passwd").write_text("me:x:1000:1000::/:/bin/sh")
    (named / "etc/group").write_text("us:x:7:")
    for number in range(TOP_NAMES_MAX):
        (full / f"n{number}").touch()
    paths = tuple(map(str, (bare, named, full, tmp_path / "absent")))
    sandbox = await started_or_skip(SandboxSettings(instance=INSTANCE, image_paths=paths))
    try:
        assert sandbox.enforcement.image_paths == paths[:3]
        assert f"images in {paths[3]} cannot be used: open_tree: No such" in " ".join(
            sandbox.enforcement.notes
        )
        script = "id -un; id -gn; cat /etc/group"
        assert await shell(sandbox, script, image=paths[0]) == (0, "job\njob\njob:x:1000:\n")
        assert await shell(sandbox, script, image=paths[1]) == (
            0, "me\njob\nus:x:7:\njob:x:1000:\n",
        )  # fmt: skip
        plan = SandboxPlan(
            key="f", argv=("true",), image=paths[2], require=sandbox.enforcement.enforced
        )
        outcome = await sandbox.run(plan, b"")
        assert outcome.cause == "sandbox_failed"
        assert f"more than {TOP_NAMES_MAX} entries" in outcome.detail
    finally:
        await sandbox.close()
    assert leftovers(INSTANCE) == []


async def test_a_job_in_an_image_has_its_devices_and_no_other(image: Path) -> None:
    sandbox = await started_or_skip(
        SandboxSettings(instance=INSTANCE, image_paths=(str(image),), devices=("/dev/tty",))
    )
    script = "ls /dev | cat; ls -A /.devices; head -c1 /dev/zero | cat >/dev/null"
    try:
        code, text = await shell(sandbox, script, image=str(image), devices=("/dev/tty",))
        assert sorted(text.split()).count("tty") == 1 and code == 0, "the staged ones are not seen"
        code, text = await shell(sandbox, script, image=str(image))
        assert "tty" not in text.split() and "null" in text.split()
    finally:
        await sandbox.close()


async def test_the_next_agent_goes_on_with_a_job_in_an_image(image: Path, tmp_path: Path) -> None:
    settings = SandboxSettings(instance=INSTANCE, image_paths=(str(image),))
    await (await started_or_skip(settings)).close()
    first = await NativeSandbox.start(settings, tmp_path)
    plan = SandboxPlan(
        key="kept", argv=("/bin/sh", "-c", "echo begun; cat; cat /etc/release"), image=str(image),
        require=first.enforcement.enforced,
    )  # fmt: skip
    began = asyncio.Event()
    running = asyncio.create_task(first.run(plan, b"x" * 200_000, lambda *_: began.set()))
    await began.wait()
    first.detach()
    with pytest.raises(asyncio.CancelledError):
        await running
    second = await NativeSandbox.adopt(settings, tmp_path)
    assert second is not None and second.enforcement.has_image(str(image))
    seen: list[bytes] = []
    ended = await second.resume(plan, {}, lambda _, data: seen.append(data))
    assert ended.exit_code == 0 and b"".join(seen).endswith(b"tiny\n")
    assert await shell(second, "cat /etc/release", image=str(image)) == (0, "tiny\n")
    await second.close()
