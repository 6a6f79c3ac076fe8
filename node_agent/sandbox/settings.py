"""What the operator decides about sandboxes on a node, with defaults that suit most."""

from __future__ import annotations

import os
import sys
from typing import Literal

import msgspec

# What a job needs to run programs of the host. /home, /root, /var, /run, /sys, /boot, /mnt, /srv,
# /media and the host's /tmp are not listed and therefore do not exist inside.
VISIBLE_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt")
# Enough of /etc for the dynamic linker, time zones, names, TLS roots and alternatives; no shadow,
# no keys, no host configuration. passwd, group and hosts are our own.
ETC_NAMES = (
    "alternatives", "ca-certificates.conf", "debian_version", "ld.so.cache", "ld.so.conf",
    "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf", "os-release", "protocols",
    "redhat-release", "services", "ssl/certs", "ssl/openssl.cnf", "pki/tls/certs",
    "pki/ca-trust/extracted", "timezone",
)  # fmt: skip
# Each running job has a uid of its own, two pipes and about ten descriptors in the launcher.
JOBS_MAX = 512
# How long jobs run on without any agent. The leader declares the node lost after seconds and tries
# the jobs elsewhere; this bounds what a node that nobody looks after any more goes on doing.
ORPHAN_GRACE_S = 600.0
# Sandboxes that wait for their job, 1 MB each. Most of them are made at a time, which is cheaper,
# and a node seldom starts more short jobs at once.
PREPARED = 8

Backend = Literal["native", "crun", "runc", "runsc"]
BACKENDS: tuple[Backend, ...] = ("native", "crun", "runc", "runsc")


class SandboxSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one NativeSandbox.

    ``backend`` carries the jobs out: our own launcher, or a container runtime (ADR 0009), found
    along PATH unless ``runtime_path`` names it. ``extra_ro_paths`` shows further host paths (e.g.
    ``interpreter_paths()``); a missing one is an error. ``hidden_paths`` covers paths inside
    visible ones. ``devices`` lists the device nodes that plans may ask for, ``image_paths`` the
    directories that are, or below which lie, the images that they may ask for (one that cannot be
    had is left out, with a note). ``instance`` names this agent's cgroups:
    ``outrider-<instance>.*``. ``cgroup_parent`` replaces the agent's own cgroup in every hierarchy.
    ``orphan_grace_s`` is how long a launcher with a named socket keeps jobs
    without any agent before it kills them.
    ``prepared``: at most so many sandboxes are made ahead of their jobs; 0 for none.
    """

    backend: Backend = "native"
    runtime_path: str = ""
    mode: Literal["auto", "root", "userns"] = "auto"
    visible_paths: tuple[str, ...] = VISIBLE_PATHS
    etc_names: tuple[str, ...] = ETC_NAMES
    extra_ro_paths: tuple[str, ...] = ()
    hidden_paths: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    image_paths: tuple[str, ...] = ()
    allow_host_network: bool = False
    instance: str = "agent"
    cgroup_parent: str = ""
    jobs_max: int = JOBS_MAX
    prepared: int = PREPARED
    python: str = ""
    start_timeout_s: float = 60.0
    orphan_grace_s: float = ORPHAN_GRACE_S


def interpreter_paths() -> tuple[str, ...]:
    """Paths to add to ``extra_ro_paths`` so that jobs can run the agent's own interpreter."""
    prefix = os.path.realpath(sys.base_prefix)
    return () if f"{prefix}/".startswith(("/usr/", "/opt/")) else (prefix,)


def interpreter() -> str:
    """The interpreter that jobs can run once ``interpreter_paths()`` are visible."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{os.path.realpath(sys.base_prefix)}/bin/python{version}"


def problem(settings: SandboxSettings) -> str | None:
    """What is wrong with the settings, or None."""
    shown = (*settings.visible_paths, *settings.extra_ro_paths, *settings.image_paths)
    paths = (*shown, *settings.hidden_paths)
    for path in (*paths, *settings.devices):
        if not path.startswith("/") or os.path.normpath(path) != path or path == "/":
            return f"sandbox path {path!r} must be absolute, normalized and not /"
    for device in settings.devices:
        if not device.startswith("/dev/"):
            return f"device {device!r} must be under /dev"
    name = settings.instance
    if not name or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
        return f"instance {name!r} must consist of letters, digits, '-' and '_'"
    if settings.orphan_grace_s < 0:
        return "orphan_grace_s must not be negative"
    if settings.prepared < 0:
        return "prepared must not be negative"
    if settings.jobs_max < 1:
        return "jobs_max must be at least 1"
    return None
