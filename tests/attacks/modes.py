"""Starts the attack runner once per mode: native as root and as an ordinary user, and by the
container runtimes that are installed here."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node_agent.oci.runtime import RuntimeUnusable, find
from node_agent.sandbox.settings import BACKENDS, Backend

REPO = Path(__file__).resolve().parents[2]
# No account needed: any uid that owns nothing on this machine.
ORDINARY_UID = 54321
# An interpreter of the distribution: an ordinary user cannot read another user's.
SYSTEM_PYTHON = "/usr/bin/python3"
# A whole run takes seconds, in an emulated guest minutes; a hang is ended by the test's own limit.
RUN_TIMEOUT_S = 1_700

MODES = ("root", "userns", "crun", "runc", "runsc")


def backend_of(mode: str) -> Backend:
    """Which backend a mode runs; both native modes are one. Skips where there is no runtime."""
    backend: Backend = next((name for name in BACKENDS if name == mode), "native")
    if backend != "native":
        require_runtime(backend)
    return backend


def require_runtime(backend: Backend) -> None:
    """Skips, with the reason, where this container runtime cannot be used."""
    if os.geteuid() != 0:
        pytest.skip("container runtimes are run as root")
    try:
        find(backend)
    except RuntimeUnusable as error:
        pytest.skip(str(error))


def ordinary_user() -> dict[str, Any]:
    """Arguments for ``subprocess`` to run as an ordinary user; skips if that is impossible."""
    spec = importlib.util.find_spec("msgspec")
    assert spec is not None and spec.origin is not None
    packages = Path(spec.origin).parents[1]
    if os.geteuid() != 0:
        path = f"{REPO}:{packages}"
        return {"args": [sys.executable], "env": {**os.environ, "PYTHONPATH": path}}
    options: dict[str, Any] = {
        "args": [SYSTEM_PYTHON],
        "env": {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{REPO}:{packages}"},
        "user": ORDINARY_UID,
        "group": ORDINARY_UID,
        "extra_groups": [],
        "cwd": "/",
    }
    imports = "import msgspec, node_agent.sandbox.native"
    try:
        trial = _run(options, "-c", imports)
    except OSError as error:
        pytest.skip(f"no interpreter for an ordinary user: {error}")
    if trial.returncode != 0:
        pytest.skip(f"an ordinary user cannot import us: {trial.stderr.strip()[-200:]}")
    return options


def _run(options: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
    rest = {name: value for name, value in options.items() if name != "args"}
    return subprocess.run(
        [*options["args"], *more],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
        **rest,
    )


def run_module(mode: str, module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module`` in ``mode``; its standard output is one JSON object."""
    if mode != "userns":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        options: dict[str, Any] = {"args": [sys.executable], "cwd": REPO}
    else:
        options = ordinary_user()
    done = _run(options, "-m", module, *arguments)
    if "SandboxUnavailable" in done.stderr and mode == "userns":
        pytest.skip(f"no such sandbox here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    expected = "userns" if mode == "userns" else "root"
    assert answer["mode"] == expected, f"expected mode {expected}, got {answer['mode']}"
    return answer


@functools.cache
def attack_results(mode: str) -> dict[str, Any]:
    """Results of all attacks in one mode; run once."""
    backend = backend_of(mode)
    results: dict[str, Any] = run_module(mode, "tests.attacks.runner", backend)["results"]
    return results
