"""The native sandbox as tests start it."""

from pathlib import Path

import pytest

from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings


async def started_or_skip(settings: SandboxSettings) -> NativeSandbox:
    """A running sandbox; the test is skipped, with the reason, where this machine has none."""
    try:
        return await NativeSandbox.start(settings)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


def inits(sandbox: NativeSandbox) -> list[int]:
    """Pids of all that jobs have, or wait for one; by their own pid namespace."""
    return [pid for pid in _children(sandbox) if _namespaces(pid) > 1]


def zygote(sandbox: NativeSandbox) -> int:
    """Its pid: the launcher's one child in the launcher's own pid namespace."""
    (pid,) = [pid for pid in _children(sandbox) if _namespaces(pid) == 1]
    return pid


def _children(sandbox: NativeSandbox) -> list[int]:
    pid = sandbox.launcher_pid
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _namespaces(pid: int) -> int:
    """How many pid namespaces show it; 0 where it just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # reaped before the open, or the read
        return 0
    return len(text.partition("NSpid:")[2].splitlines()[0].split())
