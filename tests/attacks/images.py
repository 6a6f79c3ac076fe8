"""Hostile jobs in hostile images, once in one mode, in a process of its own; results as JSON.

Images: a directory that an operator configured, with what should not be in one, and an OCI layout
that is unpacked by whoever runs this.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

from node_agent.core.images import ImageSource
from node_agent.images.offer import NodeImages
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxPlan
from node_agent.sandbox.settings import BACKENDS, Backend, SandboxSettings
from tests.attacks.runner import host_state, leftovers
from tests.images import Layout, layer_of_folder, tiny_root

INSTANCE = f"attacks-images-{os.getpid()}"
_PRIVATE = ("/proc", "/dev", "/tmp", "/work")

WRITES = """
for place in / /etc /usr /usr/bin /lib /esc /up /srv /dev /proc; do
  (touch $place/new) 2>/dev/null && echo "made $place/new"
done
for file in /etc/passwd /etc/release /usr/bin/sh /single /suid/id; do
  (echo x >> $file) 2>/dev/null && echo "wrote $file"
  rm -f $file 2>/dev/null && [ ! -e $file ] && echo "removed $file"
  chmod 777 $file 2>/dev/null && echo "chmod $file"
  ln $file /tmp/linked 2>/dev/null && echo "linked $file"
done
mkdir /work/own && touch /work/own/file /tmp/file /dev/shm/file && echo fine
"""
HOST = """
for path in /home /root /var /sys /boot /run /media /opt /mnt /old-root /.devices \
  /.outrider-passwd /etc/shadow /etc/os-release /etc/hostname $SECRET /esc/$SECRET \
  /up/$SECRET /etc/climb/$SECRET /proc/1/root/etc /proc/1/cwd/etc /proc/1/root/$SECRET; do
  [ -e $path ] && echo "there: $path"
done
echo /*
"""
LEAKS = """
for file in /etc/passwd /etc/group /srv/environ /etc/climb/1/environ; do
  cat $file
done | tr '\\0' ' '
"""
SETUID = "/suid/id -u"
DEVICES = "for node in /devs/*; do head -c 1 $node >/dev/null 2>&1 && echo read $node; done"
MOUNTS = "cat /proc/self/mountinfo"
SCRIPTS = {
    "writes": WRITES, "host": HOST, "leaks": LEAKS, "setuid": SETUID, "devices": DEVICES,
    "mounts": MOUNTS,
}  # fmt: skip
_CUT = "=====\n"


def hostile_root(folder: Path) -> Path:
    """A root that leads everywhere, if anybody followed it."""
    root = tiny_root(folder, "rm", "chmod", "tr", "mknod")
    (root / "esc").symlink_to("/../../../../../..")
    (root / "up").symlink_to("../../../../../..")
    (root / "tmp").symlink_to("usr")
    (root / "work").symlink_to("/etc")
    (root / "proc").symlink_to("/etc")
    (root / "dev").mkdir()
    (root / "dev/null").write_text("not a device")
    (root / ".devices").mkdir()
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/proc/self/environ")
    (root / "etc/group").symlink_to("../../../../../../../proc/1/environ")
    (root / "etc/climb").symlink_to("/proc")
    (root / "srv").mkdir()
    (root / "srv/environ").symlink_to("/proc/1/environ")
    (root / "single").write_text("a file at the top")
    os.mkfifo(root / "fifo")
    (root / "suid").mkdir()
    shutil.copy(root / "usr/bin/id", root / "suid/id")
    (root / "suid/id").chmod(0o6755)
    (root / "devs").mkdir()
    if os.geteuid() == 0:
        for name, number in (("mem", 1), ("null", 3), ("zero", 5)):
            os.mknod(root / "devs" / name, 0o666 | stat.S_IFCHR, os.makedev(1, number))
    return root


def content(root: Path) -> dict[str, Any]:
    """What no job may change."""
    found = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        found[str(path)] = (facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    return found


async def tried(sandbox: NativeSandbox, image: str, script: str, secret: str) -> str:
    """What a script in the image wrote."""
    seen: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    plan = SandboxPlan(
        key="a", argv=("/bin/sh", "-c", script), env={"SECRET": secret}, image=image,
        require=sandbox.enforcement.enforced, memory_bytes=64 * MIB, pids_max=32,
    )  # fmt: skip
    outcome = await sandbox.run(plan, b"", lambda stream, data: seen[stream].append(data))
    if outcome.cause != "exited":
        return str(outcome)
    return b"".join(seen["stdout"]).decode("utf-8", "replace")


def verdicts(told: dict[str, str], usual: str, *, own_kernel: bool) -> dict[str, bool]:
    """Whether each attack was held. ``own_kernel``: the runtime brings one, with its own /sys, and
    pid 1 is the job's own process, whose root is the job's."""
    known = {"there: /sys", "there: /proc/1/root/etc"} if own_kernel else set[str]()
    found = {line for line in told["host"].splitlines() if line.startswith("there:")}
    top = {name for line in told["host"].splitlines()[-1:] for name in line.split()}
    private = (*_PRIVATE, "/sys") if own_kernel else _PRIVATE
    wrong = [line for line in told["mounts"].splitlines() if _writable(line, private)]
    leaks = ("OUTRIDER_INSTANCE", "LD_BIND_NOW", "PYTHONPATH")  # of the launcher and of ours
    return {
        "writes": told["writes"] == "fine\n",
        "host": found <= known and {"/usr", "/etc", "/proc"} <= top,
        "leaks": not any(word in told["leaks"] for word in leaks),
        "setuid": int(told["setuid"]) >= 1000,
        "devices": told["devices"] == "",
        "mounts": bool(told["mounts"]) and not wrong,
        "usual": usual.startswith("uid="),
    }


def _writable(line: str, private: tuple[str, ...]) -> bool:
    """A mount that is not read-only, nosuid and nodev, but where the job's own lie."""
    words = line.split()
    options = set(words[5].split(","))
    if any(words[4] == own or words[4].startswith(own + "/") for own in private):
        return False
    return words[4] != "/" and not {"ro", "nosuid", "nodev"} <= options


async def run_all(backend: Backend, folder: Path) -> dict[str, Any]:
    state, secret = folder / "state", folder / "secret"
    state.mkdir()
    secret.write_text("of the host")
    root = hostile_root(folder / "root")
    (root / "fifo").unlink()
    layout = Layout(folder / "layout")
    layout.tag(layout.image(layer_of_folder(root)))
    os.mkfifo(root / "fifo")
    sources = {
        "directory": ImageSource("dir", str(root)),
        "layout": ImageSource("oci", str(layout.folder)),
    }
    images = NodeImages(sources, state)
    await images.unpack(lambda: None, sweep=True)
    before, host = content(folder), host_state()
    settings = SandboxSettings(
        instance=f"{INSTANCE}-{backend}", backend=backend, image_paths=images.paths
    )
    sandbox = await NativeSandbox.start(settings)
    results: dict[str, Any] = {}
    try:
        for name in sources:
            image = await images.get(name)
            assert image is not None
            script = f"\necho {_CUT}".join(SCRIPTS.values())
            answers = (await tried(sandbox, image.root, script, str(secret))).split(_CUT)
            assert len(answers) == len(SCRIPTS), answers
            told = dict(zip(SCRIPTS, answers, strict=True))
            usual = await tried(sandbox, "", "id; ls -d /single", str(secret))
            told["usual"] = usual
            held = verdicts(told, usual, own_kernel=backend == "runsc")
            results |= {f"{name}-{key}": {"held": held[key], "saw": told[key]} for key in held}
    finally:
        await sandbox.close()
    changed = {key: value for key, value in content(folder).items() if before.get(key) != value}
    results["images-unchanged"] = {"held": not changed, "saw": str(changed)}
    after, left = host_state(), leftovers(settings.instance)
    results["host-unchanged"] = {"held": host == after and not left, "saw": f"{left} {after}"}
    return {"mode": sandbox.enforcement.mode, "results": results}


if __name__ == "__main__":
    chosen: Backend = next(name for name in BACKENDS if name == sys.argv[1])
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        json.dump(asyncio.run(run_all(chosen, Path(made))), sys.stdout)
