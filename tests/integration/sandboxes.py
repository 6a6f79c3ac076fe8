"""The native sandbox as tests start it."""

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
