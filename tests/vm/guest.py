"""One guest: boots over the host's own files, runs one command, and is gone.

Four CPUs in two NUMA nodes, pure cgroup v2, loopback alone, one small disk. The host's root is its
own, read-only, below a tmpfs: what the command writes ends with it, except in `/vm`, which is a
directory of ours.
Emulated (TCG), because a machine of CI has no KVM: about five to ten times slower than the host.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from idl.errors import PlatformFaultError
from tests import patience
from tests.vm.parts import Parts, Unavailable

INIT: Final = Path(__file__).with_name("init.sh")
NODE_MEMORY_MIB: Final = 1536
"""Per NUMA node: the suite's own, and the tmpfs over the root."""
DISK_FILE_MIB: Final = 4
NO_BALANCING: Final = "numa_balancing=disable"
"""Under a loaded host this guest kernel once fell over while it moved pages between its nodes
(migrate_misplaced_folio), which nothing here tests; the nodes stay."""
SOCKET_WAIT_S: Final = 10.0
POLL_S: Final = 0.2


def run_in_guest(
    parts: Parts, command: Sequence[str], shared: Path, limit_s: float, show: Callable[[str], None]
) -> int | None:
    """Runs `command` as root in the present directory; its exit status, None past `limit_s`.

    `shared` is its /vm. `show` gets the console's lines as they come. Raises Unavailable where no
    directory can be served, PlatformFaultError where the guest comes up and fails.
    """
    (shared / "run.sh").write_text(_script(command))
    console = shared / "console"
    console.touch()
    with ExitStack() as stack:
        root, own = shared / "root.sock", shared / "vm.sock"
        _serve(stack, parts, root, Path("/"), "always")
        _serve(stack, parts, own, shared, "none")
        guest = _spawn(
            stack, _qemu(parts, _initrd(parts, shared), root, own, console, _disk(shared))
        )
        _follow(guest, console, limit_s, show)
        timed_out = guest.poll() is None
    status = shared / "status"
    if status.exists():
        return int(status.read_text())
    if timed_out:
        return None
    words = console.read_text(errors="replace").strip()[-400:]
    raise PlatformFaultError(f"the guest ended before its command did: {words}")


def _script(command: Sequence[str]) -> str:
    names = ("PATH", "HOME", "LANG", "PYTHONPATH", "PYTEST_TIMEOUT", "HYPOTHESIS_PROFILE",
             patience.VARIABLE)  # fmt: skip
    exports = "".join(
        f"export {name}={shlex.quote(os.environ[name])}\n" for name in names if name in os.environ
    )
    return (
        f"{exports}cd {shlex.quote(str(Path.cwd()))}\n{shlex.join(command)} </dev/null 2>&1\n"
        "echo $? > /vm/status.new && mv /vm/status.new /vm/status\n"
        "exec /run/busybox poweroff -f\n"  # from memory: virtiofs is gone before the machine is
    )


def _initrd(parts: Parts, folder: Path) -> Path:
    """busybox, the modules and `init.sh`, as an archive that the kernel unpacks."""
    tree = folder / "initrd"
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy(parts.busybox, tree / "bin/busybox")
    for module in parts.modules:
        shutil.copy(module, tree / "modules")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = folder / "initrd.cpio"
    with archive.open("wb") as out:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"],
            input=names.encode(), stdout=out, cwd=tree, check=True,
        )  # fmt: skip
    return archive


def _disk(folder: Path) -> Path:
    """A real disk with one file, because only a block device can be throttled: /disk/data."""
    content = folder / "content"
    content.mkdir()
    (content / "data").write_bytes(os.urandom(DISK_FILE_MIB << 20))
    image = folder / "disk.img"
    size = f"{4 * DISK_FILE_MIB}M"
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(content), str(image), size], check=True
    )
    return image


def _serve(stack: ExitStack, parts: Parts, socket: Path, source: Path, cache: str) -> None:
    """One directory of the host for the guest."""
    options = f"source={source},cache={cache},sandbox=chroot"
    server = _spawn(stack, [parts.virtiofsd, f"--socket-path={socket}", "-o", options])
    deadline = time.monotonic() + SOCKET_WAIT_S
    while not socket.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"virtiofsd does not serve {source} (exit {server.poll()})")
        time.sleep(POLL_S)


def _qemu(
    parts: Parts, initrd: Path, root: Path, own: Path, console: Path, disk: Path
) -> list[str]:
    memory = [
        word
        for node in (0, 1)
        for word in (
            "-object", f"memory-backend-memfd,id=m{node},size={NODE_MEMORY_MIB}M,share=on",
            "-numa", f"node,nodeid={node},cpus={2 * node}-{2 * node + 1},memdev=m{node}",
        )
    ]  # fmt: skip
    files = [
        word
        for tag, socket in (("hostfs", root), ("vm", own))
        for word in (
            "-chardev", f"socket,id={tag},path={socket}",
            "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}",
        )
    ]  # fmt: skip
    return [
        parts.qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35",
        "-smp", "4,sockets=2,cores=2", "-m", f"{2 * NODE_MEMORY_MIB}M",
        *memory, "-numa", "dist,src=0,dst=1,val=21", *files,
        "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot",
        "-serial", f"file:{console}", "-kernel", str(parts.kernel), "-initrd", str(initrd),
        "-drive", f"file={disk},format=raw,if=virtio,readonly=on",
        "-append", f"console=ttyS0 quiet loglevel=2 panic=-1 {NO_BALANCING}",
    ]  # fmt: skip


def _spawn(stack: ExitStack, command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A process that ends with the stack, and with us however we end (setpriv(1))."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _follow(
    guest: "subprocess.Popen[bytes]", console: Path, limit_s: float, show: Callable[[str], None]
) -> None:
    """Shows the console until the guest is off or the time is over."""
    deadline = time.monotonic() + limit_s
    with console.open(errors="replace") as lines:
        while True:
            ended = guest.poll() is not None or time.monotonic() > deadline
            while text := lines.readline():
                show(text.rstrip("\n"))
            if ended:
                return
            time.sleep(POLL_S)
