"""Every attack of the table, in every mode this machine allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.modes import MODES, REPO, attack_results
from tests.attacks.table import ATTACKS

_NAMES = [attack.id for attack in ATTACKS]
_NAMES += ["30-47-two-jobs-meet", "host-unchanged", "nothing-left"]


def test_every_attack_has_a_name_of_its_own() -> None:
    assert len(set(_NAMES)) == len(_NAMES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", _NAMES)
def test_the_sandbox_holds(mode: str, name: str) -> None:
    result = attack_results(mode)[name]
    assert result["held"], result["saw"]


_SWAPPED_DEVICE = """
import os, sys
from node_agent.launcher import kernel, rootfs
uid = os.geteuid()
kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
    with open("/proc/self/" + name, "w") as file: file.write(text)
target = sys.argv[1] + "/node"
for source in ("/dev/null", sys.argv[1] + "/link", sys.argv[1] + "/file"):
    try:
        rootfs.bind_device(source, target)
    except OSError as error:
        print("refused", error.errno, end=" ")
    else:
        print("bound", end=" ")
"""


def test_a_device_swapped_for_a_link_is_refused(tmp_path: Path) -> None:
    """19: CVE-2025-31133, a /dev/null that is a symlink must never be mounted."""
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "file").write_text("not a device")
    done = subprocess.run(
        [sys.executable, "-c", _SWAPPED_DEVICE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=30,
        check=False,
    )
    if "PermissionError" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()[-200:]}")
    assert done.stdout.split() == ["bound", "refused", "19", "refused", "19"], done.stderr
