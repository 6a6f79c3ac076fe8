"""Which backend carries plans out: our own launcher, or a container runtime behind the same one.

Both launchers speak one protocol (`node_agent.launcher.main`), so one client serves both; what
differs is which program is started, and what it is told.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

from node_agent.oci.runtime import RuntimeUnusable, find
from node_agent.sandbox import seccomp
from node_agent.sandbox.plan import SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings

HOME_NAME: Final = "oci"
"""In the agent's state directory: roots, bundles and the runtime's own records."""


def oci_setup(settings: SandboxSettings, machine: str, home: Path | None) -> dict[str, Any]:
    """What the OCI launcher needs to know besides the settings. Raises SandboxUnavailable."""
    try:
        runtime = find(settings.backend, settings.runtime_path)
    except RuntimeUnusable as error:
        raise SandboxUnavailable(str(error)) from error
    folder = Path(tempfile.mkdtemp(prefix="outrider-oci-")) if home is None else home / HOME_NAME
    return {
        "home": str(folder.absolute()),
        "runtime": list(runtime),
        "profile": seccomp.oci_profile(machine),
    }
