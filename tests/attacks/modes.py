"""Starts the attack runner once per mode: as root, and as an ordinary user without privileges."""

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

REPO = Path(__file__).resolve().parents[2]
# No account needed: any uid that owns nothing on this machine.
ORDINARY_UID = 54321
# An interpreter of the distribution: an ordinary user cannot read another user's.
SYSTEM_PYTHON = "/usr/bin/python3"
# A whole run takes seconds; a hang must not take the suite's time.
RUN_TIMEOUT_S = 120

MODES = ("root", "userns")


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
    if mode == "root":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        options: dict[str, Any] = {"args": [sys.executable], "cwd": REPO}
    else:
        options = ordinary_user()
    done = _run(options, "-m", module, *arguments)
    if "SandboxUnavailable" in done.stderr and mode == "userns":
        pytest.skip(f"no sandbox for an ordinary user here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["mode"] == mode, f"expected mode {mode}, got {answer['mode']}"
    return answer


@functools.cache
def attack_results(mode: str) -> dict[str, Any]:
    """Results of all attacks in one mode; run once."""
    results: dict[str, Any] = run_module(mode, "tests.attacks.runner")["results"]
    return results
