"""That the guest is what it is meant to be; on any other machine these are skipped."""

import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, Limit, SandboxPlan
from node_agent.sandbox.settings import SandboxSettings, interpreter, interpreter_paths
from node_agent.topology.node import read_topology

pytestmark = pytest.mark.skipif(
    platform.node() != "outrider-guest", reason="only in the guest of `make test-vm`"
)


@asynccontextmanager
async def started(*more: str) -> AsyncIterator[NativeSandbox]:
    paths = (*interpreter_paths(), *more)
    sandbox = await NativeSandbox.start(SandboxSettings(instance="guest", extra_ro_paths=paths))
    try:
        yield sandbox
    finally:
        await sandbox.close()


def test_cgroups_are_v2_alone() -> None:
    mounts = [line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert "cgroup" not in mounts and mounts.count("cgroup2") == 1
    controllers = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(controllers)


def test_the_machine_has_two_numa_nodes() -> None:
    numa = read_topology().parts.numa
    assert [node.id for node in numa] == [0, 1]
    assert [list(node.distances) for node in numa] == [[10, 21], [21, 10]]
    assert [sum(len(core) for core in node.cores) for node in numa] == [2, 2]


async def test_only_what_has_no_disk_is_missing() -> None:
    """Whatever v2 code does not work shows here: every other limit is enforced."""
    async with started() as sandbox:
        assert sandbox.enforcement.cgroup == "v2"
        missing = dict(sandbox.enforcement.missing)
        assert "overlay" in missing.pop(Limit.IO)
        assert missing == {}
        assert sandbox.enforcement.enforced == frozenset(Limit) - {Limit.IO}


_READ = """
import mmap, os, time
fd = os.open("/disk/data", os.O_RDONLY | os.O_DIRECT)
block, start = mmap.mmap(-1, 1 << 18), time.monotonic()
while os.readv(fd, [block]): pass
print(time.monotonic() - start)
"""


async def test_a_disk_is_throttled_and_counted() -> None:
    """A lower bound on time, which no load can break: 4 MiB at 2 MiB/s (io.max, io.stat)."""
    async with started("/disk") as sandbox:
        plan = SandboxPlan(
            key="reader", argv=(interpreter(), "-I", "-c", _READ), wall_ms=60_000,
            io_read_bytes_per_s=2 * MIB, require=sandbox.enforcement.enforced,
        )  # fmt: skip
        output: list[bytes] = []
        outcome = await sandbox.run(plan, b"", lambda _, data: output.append(data))
    assert outcome.exit_code == 0, output
    assert float(b"".join(output)) > 1.0
    assert outcome.io_read_bytes is not None and outcome.io_read_bytes >= 4 * MIB
