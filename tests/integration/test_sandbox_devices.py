"""11: a device that was not given cannot be opened, even where its node exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Runs as root of the host inside a cgroup under our filter: only the filter can refuse.
_TRIES = """
import errno, os, sys
from node_agent.launcher import cgroups
def read(path):
    with open(path) as file: return file.read()
tree = cgroups.open_tree(
    "outrider-devices-test.1",
    cgroups.find_hierarchies(read("/proc/self/mountinfo"), read("/proc/self/cgroup")),
    frozenset((os.getpid(),)),
)
base = ["/dev/null", "/dev/zero"]
kind = tree.restrict_devices(base, ["/dev/full"])
job = tree.make("j1-x")
tree.grant_devices(job, [])
print(kind, end=" ", flush=True)
def tried(path, flags):
    try: os.close(os.open(path, flags))
    except OSError as error: print(errno.errorcode[error.errno], end=" ")
    else: print("ok", end=" ")
pid = os.fork()
if pid == 0:
    for fd in job.join_fds(): os.write(fd, b"0")
    if job.v2: cgroups.write_at(job.v2.fd, "cgroup.procs", "0")
    tried("/dev/null", os.O_RDWR); tried("/dev/zero", os.O_RDONLY); tried("/dev/full", os.O_RDONLY)
    tried("/dev/kmsg", os.O_RDONLY)
    try: os.mknod(sys.argv[1] + "/node", 0o20666, os.makedev(1, 3))
    except OSError as error: print(errno.errorcode[error.errno], end=" ")
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
job.close_watch()
while not job.remove(): pass
tree.remove()
"""


@pytest.mark.root
def test_the_filter_refuses_what_was_not_given(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: an ordinary user may not attach device programs")
    done = subprocess.run(
        [sys.executable, "-c", _TRIES, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kind, *answers = done.stdout.split()
    if kind == "none":
        pytest.skip("no cgroup here can filter devices")
    full = "EPERM" if kind == "ebpf" else "ok"  # v1 holds one list for all jobs
    assert answers == ["ok", "ok", full, "EPERM", "EPERM"]
