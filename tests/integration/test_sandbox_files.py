"""Input files before the start and collected files after the end, attacked from inside the job."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from idl import limits as bound
from node_agent.sandbox import outputs
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.outputs import Listing
from node_agent.sandbox.plan import (
    MIB,
    PlacedInput,
    PlanRefused,
    SandboxOutcome,
    SandboxPlan,
)
from node_agent.sandbox.settings import SandboxSettings, interpreter, interpreter_paths
from node_agent.sandbox.streams import pack
from tests.attacks.runner import leftovers
from tests.integration.sandboxes import started_or_skip

INSTANCE = f"files-{os.getpid()}"


@pytest.fixture
async def sandbox() -> AsyncIterator[NativeSandbox]:
    settings = SandboxSettings(instance=INSTANCE, extra_ro_paths=interpreter_paths())
    started = await started_or_skip(settings)
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield started
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a job's descriptors are left open"
    await started.close()
    assert leftovers(INSTANCE) == []


class Collected:
    """What a job left."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = patterns
        self.listing = Listing((), {})
        self.data: dict[str, bytes] = {}

    async def take(self, work_fd: int) -> None:
        self.listing = outputs.find(work_fd, self._patterns)
        self.data = {f.name: outputs.read(work_fd, f) for f in self.listing.files}


async def run(
    sandbox: NativeSandbox,
    script: str,
    patterns: tuple[str, ...] = (),
    given: dict[PlacedInput, bytes] | None = None,
    **fields: Any,
) -> tuple[SandboxOutcome, Collected, str]:
    python = fields.pop("python", False)
    argv = (interpreter(), "-I", "-c", script) if python else ("/bin/sh", "-c", script)
    files = given or {}
    defaults: dict[str, Any] = {
        "argv": argv,
        "require": sandbox.enforcement.enforced,
        "wall_ms": 60_000,
        "grace_ms": 50,
        "memory_bytes": 128 * MIB,
        "inputs": tuple(files),
        "outputs": patterns,
    }
    text: list[bytes] = []
    collected = Collected(patterns)
    outcome = await sandbox.run(
        SandboxPlan(key="a", **(defaults | fields)),
        b"",
        lambda _, data: text.append(data),
        inputs_fd=pack(files.values()) if files else -1,
        on_work=collected.take,
    )
    return outcome, collected, b"".join(text).decode("utf-8", "replace")


def given(path: str, data: bytes, *, writable: bool = False) -> dict[PlacedInput, bytes]:
    return {PlacedInput(path=path, size_bytes=len(data), writable=writable): data}


async def test_inputs_are_there_before_the_job(sandbox: NativeSandbox) -> None:
    files = given("in/a.txt", b"first") | given("in/deep/er/b", b"") | given("c", b"x" * 300_000)
    files |= given("own/d", b"mine", writable=True)
    script = (
        "cat in/a.txt; wc -c < in/deep/er/b; wc -c < c; (echo no >> in/a.txt) 2>/dev/null && exit 8"
        "; touch in/new 2>/dev/null && exit 9; echo more >> own/d && cat own/d; ls -l in/a.txt"
    )
    outcome, _, text = await run(sandbox, script, given=files)
    words = text.split()
    assert words[:5] == ["first0", "300000", "minemore", "-r--r--r--", "1"], text
    assert outcome.exit_code == 0


async def test_inputs_that_do_not_fit_are_the_job_s_fault(sandbox: NativeSandbox) -> None:
    big = given("in/big", b"x" * (2 * MIB))
    outcome, _, _ = await run(sandbox, "true", given=big, work_bytes=MIB)
    assert (outcome.cause, outcome.exit_code) == ("exited", 126)
    assert "space" in outcome.detail
    many = {name: data for n in range(20) for name, data in given(f"in/{n}", b"").items()}
    outcome, _, _ = await run(sandbox, "true", given=many, work_inodes=10)
    assert outcome.exit_code == 126
    crossed = given("in/a", b"") | given("in/a/b", b"")
    outcome, _, _ = await run(sandbox, "true", given=crossed)
    assert outcome.exit_code == 126


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "a//b", "", "a\0b", "a\nb"])
async def test_an_input_cannot_leave_the_work_directory(sandbox: NativeSandbox, path: str) -> None:
    with pytest.raises(PlanRefused):
        await run(sandbox, "true", given=given(path, b"x"))


async def test_files_folders_and_patterns_are_collected(sandbox: NativeSandbox) -> None:
    script = (
        "echo one > a.txt; mkdir -p plots/deep; echo two > plots/b.png; echo three > plots/deep/c;"
        "echo x > plots/d.txt; ln a.txt hard; exit 3"
    )
    patterns = ("a.txt", "plots/", "pl*/*.png", "hard", "no-such", "none/*", "nodir/")
    outcome, collected, _ = await run(sandbox, script, patterns)
    assert outcome.exit_code == 3
    assert collected.data == {
        "a.txt": b"one\n", "plots/b.png": b"two\n", "plots/deep/c": b"three\n",
        "plots/d.txt": b"x\n", "hard": b"one\n",
    }  # fmt: skip
    assert collected.listing.missing == dict.fromkeys(("no-such", "none/*", "nodir/"), "not there")


async def test_links_pipes_sockets_and_devices_are_not_followed(sandbox: NativeSandbox) -> None:
    """23, 24, 25: links to host files, to folders outside, to themselves; FIFO; socket."""
    script = """
import os, socket
os.mkdir("out"); os.chdir("out")
os.symlink("/etc/passwd", "passwd"); os.symlink("/usr/bin", "bin"); os.symlink(".", "loop")
os.symlink("/proc/self/root", "magic"); os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
os.symlink("/etc", "/work/etc"); open("good", "w").write("good")
"""
    patterns = ("out/", "out/passwd", "etc/passwd", "etc/", "out/loop/good", "out/bin/env")
    outcome, collected, text = await run(sandbox, script, patterns, python=True)
    assert outcome.exit_code == 0, text
    assert collected.data == {"out/good": b"good"}
    missing = collected.listing.missing
    for name in ("passwd", "bin", "loop", "magic", "fifo", "socket"):
        assert "not a" in missing[f"out/{name}"]
    assert missing["etc"] == "not a folder"


async def test_sparse_files_and_their_sum_are_bounded(sandbox: NativeSandbox) -> None:
    """26: a sparse terabyte; many sparse files whose sum would be too much."""
    script = (
        "truncate -s 1T huge; mkdir many;"
        f"for n in $(seq 40); do truncate -s {bound.RESULT_BYTES_MAX // 4} many/$n; done"
    )
    outcome, collected, text = await run(sandbox, script, ("huge", "many/"))
    assert outcome.exit_code == 0, text
    total = sum(map(len, collected.data.values()))
    assert total <= bound.OUTPUT_FILES_BYTES_MAX and len(collected.data) < 40
    assert "at most" in collected.listing.missing["huge"]
    assert any("together" in why for why in collected.listing.missing.values())


async def test_many_odd_and_deep_names_are_bounded(sandbox: NativeSandbox) -> None:
    """26: more names than are looked at, names that are no text, folders too deep."""
    script = """
import os
os.mkdir("many"); os.mkdir("odd")
for n in range(30_000): os.link("many/0", f"many/{n}") if n else open("many/0", "w").close()
for name in (b"\\xff\\n", b"100%", b"\\x1b[2J", "\\u202egnp.exe".encode()):
    open(b"odd/" + name, "w").close()
deep = "deep"
for n in range(40): os.mkdir(deep); deep += "/d"
"""
    outcome, collected, text = await run(
        sandbox, script, ("odd/", "deep/", "many/"), python=True, work_inodes=60_000
    )
    assert outcome.exit_code == 0, text
    names = {name for name in collected.data if name.startswith("odd/")}
    assert names == {"odd/%FF%0A", "odd/100%25", "odd/%1B[2J", "odd/%E2%80%AEgnp.exe"}
    assert len(collected.data) <= bound.OUTPUT_FILES_MAX
    assert len(collected.listing.missing) <= outputs.MISSING_TOLD_MAX + 1
    assert any("deeper" in why for why in collected.listing.missing.values())
    assert any("names" in why for why in collected.listing.missing.values())


async def test_nothing_is_handed_over_where_nothing_is_collected(sandbox: NativeSandbox) -> None:
    outcome, collected, _ = await run(sandbox, "echo x > a")
    assert outcome.exit_code == 0 and collected.listing.files == ()


async def test_unreadable_files_are_the_owner_s_own(sandbox: NativeSandbox, tmp_path: Path) -> None:
    """27: nothing is chowned or chmodded to get at it; root reads it, an ordinary agent may not."""
    script = "echo x > locked; chmod 0 locked; mkdir shut; echo y > shut/z; chmod 0 shut"
    _, collected, _ = await run(sandbox, script, ("shut/",))
    assert collected.data == {"shut/z": b"y\n"} or collected.listing.missing
