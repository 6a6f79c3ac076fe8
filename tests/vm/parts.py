"""What a guest is made of: Debian's QEMU, virtiofsd, a static busybox and its cloud kernel.

Taken from the machine where it is there; installed by apt, as root, where it is not. The kernel is
only unpacked, into Outrider's cache, one directory per version: nothing gets into /boot.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from dataplane.broker.cache import cache_directory
from idl.errors import PlatformFaultError

KERNELS: Final = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64")
"""Meta packages, the first one that there is: 6.12 has Landlock's scopes, 6.1 not."""
PACKAGES: Final = ("qemu-system-x86", "busybox-static", "cpio")
VIRTIOFSD_PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Not in PATH; the second is Debian 12's, where it comes with QEMU."""
MODULES: Final = ("overlay.ko", "virtio_blk.ko")
"""What the guest needs that this kernel has not built in."""
APT_LIMIT_S: Final = 600


class Unavailable(PlatformFaultError):
    """No guest on this machine, and why."""


class Parts(NamedTuple):
    """Paths of everything that a guest is started with."""

    qemu: str
    virtiofsd: str
    busybox: str
    kernel: Path
    modules: tuple[Path, ...]


def find_parts() -> Parts:
    """Everything, installed where it has to be. Raises Unavailable."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"the guest is an x86_64 machine, this one is {platform.machine()}")
    if os.geteuid() != 0:
        raise Unavailable("needs root: the guest reads the host's root through virtiofsd")
    if not _present():
        _apt("update")
        more = ("virtiofsd",) if _known("virtiofsd") else ()
        _apt("install", "-y", "--no-install-recommends", *PACKAGES, *more)
    if not _present():
        raise Unavailable(f"{', '.join(PACKAGES)} are installed, but not all programs are there")
    folder = _kernel()
    kernels = sorted(folder.glob("boot/vmlinuz-*"))
    modules = tuple(path for name in MODULES for path in sorted(folder.rglob(name)))
    if not kernels or len(modules) != len(MODULES):
        raise Unavailable(f"{folder} is not a whole kernel; remove it and try again")
    return Parts(str(shutil.which("qemu-system-x86_64")), _virtiofsd(),
                 str(shutil.which("busybox")), kernels[-1], modules)  # fmt: skip


def _virtiofsd() -> str:
    places = (shutil.which("virtiofsd") or "", *VIRTIOFSD_PLACES)
    return next((place for place in places if place and Path(place).exists()), "")


def _present() -> bool:
    programs = ("qemu-system-x86_64", "busybox", "cpio")
    return all(map(shutil.which, programs)) and bool(_virtiofsd())


def _kernel() -> Path:
    """The unpacked kernel package, newest version that apt knows; else one of the cache."""
    base = cache_directory() / "guest-kernel"
    base.mkdir(exist_ok=True)
    name = _package()
    if not name:
        cached = sorted(base.iterdir())
        if cached:
            return cached[-1]
        _apt("update")
        name = _package()
    if not name:
        raise Unavailable(f"apt knows none of {', '.join(KERNELS)}")
    folder = base / name
    if not folder.exists():
        _unpack(name, folder)
    return folder


def _package() -> str:
    """The real package behind the meta package."""
    for meta in KERNELS:
        for line in _output("apt-cache", "depends", meta).splitlines():
            kind, _, found = line.strip().partition(": ")
            if kind == "Depends" and found.startswith("linux-image-"):
                return found
    return ""


def _unpack(name: str, folder: Path) -> None:
    work = folder.with_name(f".{name}.{os.getpid()}")
    work.mkdir()
    try:
        _apt("download", name, cwd=work)
        package = next(work.glob("*.deb"))
        _call("dpkg-deb", "-x", str(package), str(work))
        package.unlink()
        for module in work.rglob("*.ko.xz"):
            if module.name.removesuffix(".xz") in MODULES:
                _call("xz", "-d", str(module))
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _known(package: str) -> bool:
    return bool(_output("apt-cache", "show", package))


def _output(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=APT_LIMIT_S)
    return done.stdout if done.returncode == 0 else ""


def _apt(*arguments: str, cwd: Path | None = None) -> None:
    if not shutil.which("apt-get"):
        raise Unavailable(f"no apt-get here to install {', '.join(PACKAGES)} with")
    _call("apt-get", "-qq", *arguments, cwd=cwd)


def _call(*command: str, cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False,
        timeout=APT_LIMIT_S,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise Unavailable(f"`{' '.join(command[:3])}` failed: {last}")
