"""One job as an OCI runtime reads it: ``config.json`` from the plan. Pure; no file is touched.

Follows the OCI runtime specification 1.0.2. Everything the native launcher sets up by itself is
said here in the runtime's words; what a runtime cannot do (Landlock, a filter of our own) is left
out, and the launcher's self-test says what does not hold.
"""

from __future__ import annotations

from typing import TypedDict

from node_agent.launcher.child import JobSpec
from node_agent.launcher.init import OOM_SCORE_ADJ, SIGNALS_PENDING_MAX
from node_agent.launcher.limits import CPU_PERIOD_US, number_list

Json = dict[str, object]

OCI_VERSION = "1.0.2"
# A name that is looked up along PATH never holds a slash (execvp(3)).
_PRIVATE = ["nosuid", "nodev"]
# Rights of a device node granted to a job: read and write, never mknod.
_DEVICE_ACCESS = "rw"
# RLIMIT_NPROC counts by uid on the whole host here (a native job has a user namespace to count in):
# two agents of one host hand out the same uids, so it only says "never more". The cgroup holds. A
# kernel of the job's own counts the job's processes alone, so that the limit is exact there.
PROCESSES_OF_A_UID_MAX = 65_536


class Device(TypedDict):
    """A character device of the host: path and numbers."""

    path: str
    major: int
    minor: int


class Places(TypedDict):
    """Where things of one job are on the host, and what its sandbox is made of.

    ``ids``: its uid and gid. ``disks``: ``major:minor`` of what its rates are about.
    ``processes_max``: RLIMIT_NPROC.
    ``namespaces``: folder of the namespaces that our own init holds; empty for a runtime that
    brings a kernel of its own. ``seccomp``: the profile; None leaves it to that kernel.
    """

    root: str
    work: str
    ids: tuple[int, int]
    disks: list[str]
    cgroup: str
    processes_max: int
    namespaces: str
    seccomp: Json | None
    masked: list[str]
    devices: list[Device]
    extra_mounts: list[Json]


def build(spec: JobSpec, places: Places) -> Json:
    """The whole ``config.json``."""
    return {
        "ociVersion": OCI_VERSION,
        "hostname": spec.shape.hostname,
        # Runtimes mount it anew, read-only or not, and drop nosuid: so it holds no program itself,
        # only mounts of folders, which keep what we gave them.
        "root": {"path": places["root"], "readonly": True},
        "process": _process(spec, places),
        "mounts": [*_mounts(spec, places), *places["extra_mounts"]],
        "linux": {
            "namespaces": _namespaces(spec, places["namespaces"]),
            "cgroupsPath": places["cgroup"],
            "resources": _resources(spec, places),
            "devices": [
                {"type": "c", **device, "fileMode": 0o666, "uid": 0, "gid": 0}
                for device in places["devices"]
            ],
            "maskedPaths": places["masked"],
            **({} if places["seccomp"] is None else {"seccomp": places["seccomp"]}),
        },
    }


def _process(spec: JobSpec, places: Places) -> Json:
    uid, gid = places["ids"]
    none: list[str] = []
    kinds = ("bounding", "effective", "inheritable", "permitted", "ambient")
    return {
        "terminal": False,
        "user": {"uid": uid, "gid": gid, "umask": 0o022, "additionalGids": []},
        "args": spec.argv,
        "env": [f"{name}={value}" for name, value in spec.env.items()],
        "cwd": spec.cwd,
        "capabilities": dict.fromkeys(kinds, none),
        "noNewPrivileges": True,
        "oomScoreAdj": int(OOM_SCORE_ADJ),
        "rlimits": [
            {"type": f"RLIMIT_{name}", "soft": value, "hard": value}
            for name, value in (
                ("NOFILE", spec.open_files_max),
                ("NPROC", places["processes_max"]),
                ("CORE", 0),
                ("SIGPENDING", SIGNALS_PENDING_MAX),
                ("RTPRIO", 0),
                ("NICE", 0),
            )
        ],
    }


def _mounts(spec: JobSpec, places: Places) -> list[Json]:
    (uid, gid), shape = places["ids"], spec.shape
    owner = [f"uid={uid}", f"gid={gid}", f"nr_inodes={shape.tmp_inodes}", "mode=1777"]
    return [
        _mount("/proc", "proc", "proc", ["nosuid", "nodev", "noexec", "ro"]),
        _mount("/dev", "tmpfs", "dev", ["nosuid", "noexec", "mode=755", "size=64k", "ro"]),
        _mount("/dev/shm", "tmpfs", "shm", [*_PRIVATE, f"size={shape.shm_bytes}", *owner]),
        _mount("/tmp", "tmpfs", "tmp", [*_PRIVATE, f"size={shape.tmp_bytes}", *owner]),
        _mount("/work", "bind", places["work"], ["bind", "rw", *_PRIVATE]),
    ]


def _mount(target: str, kind: str, source: str, options: list[str]) -> Json:
    return {"destination": target, "type": kind, "source": source, "options": options}


def _namespaces(spec: JobSpec, held: str) -> list[Json]:
    """The network namespace that we hold has its loopback down; a runtime would bring it up."""
    made: list[Json] = [{"type": kind} for kind in ("mount", "ipc", "uts", "cgroup")]
    made.append({"type": "pid", **({"path": f"{held}/pid"} if held else {})})
    if spec.shape.network == "none":
        made.append({"type": "network", **({"path": f"{held}/net"} if held else {})})
    return made


def _resources(spec: JobSpec, places: Places) -> Json:
    """As `node_agent.launcher.limits`, in the specification's words: ``swap`` includes memory."""
    shape = spec.shape
    allowed: list[Json] = [
        {
            "allow": True,
            "type": "c",
            "major": device["major"],
            "minor": device["minor"],
            "access": _DEVICE_ACCESS,
        }
        for device in places["devices"]
    ]
    cpu: Json = {"quota": spec.cpu_millis * CPU_PERIOD_US // 1000, "period": CPU_PERIOD_US}
    cpu |= {"cpus": number_list(shape.cpus)} if shape.cpus else {}
    cpu |= {"mems": number_list(shape.mems)} if shape.mems else {}
    rates: Json = {
        f"throttle{kind}BpsDevice": [_rate(disk, rate) for disk in places["disks"]]
        for kind, rate in zip(("Read", "Write"), shape.io, strict=True)
        if rate
    }
    return {
        "devices": [{"allow": False, "access": "rwm"}, *allowed],
        "memory": {"limit": spec.memory_bytes, "swap": spec.memory_bytes + spec.swap_bytes},
        "pids": {"limit": spec.pids_max},
        "cpu": cpu,
        **({"blockIO": rates} if rates else {}),
    }


def _rate(disk: str, bytes_per_s: int) -> Json:
    major, minor = disk.split(":")
    return {"major": int(major), "minor": int(minor), "rate": bytes_per_s}
