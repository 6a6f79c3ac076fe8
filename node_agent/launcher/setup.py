# ruff: noqa: PTH123
# pathlib would add a third to the launcher's memory.
"""Turns a plain process into the launcher: namespaces, read-only root, an empty network.

With root the launcher only leaves the host's mount namespace. Without, it first enters a user
namespace in which it maps nobody but itself and holds every capability; all later steps are the
same, except those that a user namespace cannot do, which are reported and never skipped in silence.
"""

from __future__ import annotations

import os

from node_agent.launcher import cgroups, files, kernel, limits, rootfs
from node_agent.launcher.child import Shared
from node_agent.launcher.rootfs import RootSpec, StepError
from node_agent.launcher.zygote import Inits, program

# Jobs of one launcher run under uids UID_BASE + slot: outside what systemd and /etc/subuid hand out
# ("UIDS-GIDS.md": 1879048192..2147483647 is unused), so per-user limits never meet between jobs.
UID_BASE = 1_879_048_192
# What a job's /etc says about users.
PASSWD = "root:x:0:0:root:/:/bin/false\njob:x:1000:1000:job:/work:/bin/sh\n"
GROUP = "root:x:0:\njob:x:1000:\nnogroup:x:65534:\n"
# In a container that maps few uids: the top of what is mapped.
_MAPPED_UID_MIN = 1000


class Environment:
    """Everything set up once."""

    def __init__(self) -> None:
        self.mode = ""
        self.shared = Shared()
        self.tree = cgroups.Tree()
        self.uid_base = 0
        self.gid = -1  # of every job in userns mode; -1: same number as the uid
        self.device_filter = "none"
        self.notes: list[str] = []
        self.io_problem = ""

    def ids(self, slot: int) -> tuple[int, int]:
        """uid and gid, on the host, of the job in a slot."""
        uid = self.uid_base + (slot if self.mode == "root" else 0)
        return uid, uid if self.gid < 0 else self.gid


def prepare(settings: dict[str, object], slots: int, agent_pid: int) -> Environment:
    """Set the launcher up. Raises StepError with the step that failed."""
    environment = Environment()
    shared = environment.shared
    environment.mode = mode_of(str(settings["mode"]))
    shared.seccomp = bytes.fromhex(str(settings["seccomp"]))
    shared.last_cap = int(_read("/proc/sys/kernel/cap_last_cap"))
    shared.masked_files, shared.masked_dirs = rootfs.masked_paths()
    own = frozenset((agent_pid, os.getpid()))
    hierarchies = cgroups.find_hierarchies(
        files.read_table("/proc/self/mountinfo"),
        files.read_table("/proc/self/cgroup"),
        str(settings["cgroup_parent"]),
    )
    name = f"{cgroups.PREFIX}{settings['instance']}.{os.urandom(4).hex()}"
    environment.tree = cgroups.open_tree(name, hierarchies, own)
    shared.holds = environment.tree.holds
    look_for_disks(environment, settings)
    look_for_swap(environment)
    try:
        _devices(environment, settings)
        _namespaces(environment, slots)
        _landlock(environment)
        _network(environment)
        _root(environment, settings)
    except BaseException:
        environment.tree.remove()
        raise
    return environment


def _devices(environment: Environment, settings: dict[str, object]) -> None:
    base = [f"/dev/{name}" for name in rootfs.DEVICE_NODES]
    wanted = settings["devices"]
    extra = [str(path) for path in wanted] if isinstance(wanted, list) else []
    try:
        environment.device_filter = environment.tree.restrict_devices(base, extra)
    except OSError as error:
        raise StepError("device filter", error) from error
    if extra and environment.device_filter != "ebpf":
        environment.notes.append(
            "no device filter per job: only the private /dev separates devices"
        )


def look_for_disks(environment: Environment, settings: dict[str, object]) -> None:
    """The disks to throttle, found while the host's tree is still in view."""
    shown = [settings[name] for name in ("visible_paths", "extra_ro_paths", "image_paths")]
    paths = [str(path) for item in shown if isinstance(item, list) for path in item]
    disks, unknown = limits.disks_behind(paths, files.read_table("/proc/self/mountinfo"))
    environment.tree.disks = disks
    if unknown:
        environment.io_problem = f"no disk to throttle behind {', '.join(unknown)}"
        return
    try:
        environment.tree.try_throttle()
    except OSError as error:
        environment.io_problem = f"disks {', '.join(disks)} cannot be throttled: {error.strerror}"


def look_for_swap(environment: Environment) -> None:
    """Notes it where the kernel does not count swap."""
    tree = environment.tree
    memory = tree.v1.get("memory")
    if memory is not None and not files.read_at(memory.fd, "memory.memsw.limit_in_bytes"):
        environment.notes.append("swap of jobs is not limited: this kernel does not account for it")


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def mode_of(wanted: str) -> str:
    """``root`` or ``userns``. Raises StepError where root is wanted and not there."""
    effective = 0
    for line in files.rows_of(files.read_table("/proc/self/status")):
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    # SETUID, SETGID, SETPCAP, SYS_ADMIN: what a launcher with root does without a user namespace.
    needed = 1 << 7 | 1 << 6 | 1 << kernel.CAP_SETPCAP | 1 << kernel.CAP_SYS_ADMIN
    privileged = os.geteuid() == 0 and effective & needed == needed
    if wanted == "root" and not privileged:
        raise StepError("mode", PermissionError(1, "mode 'root' needs root with CAP_SYS_ADMIN"))
    return "root" if privileged and wanted != "userns" else "userns"


def _namespaces(environment: Environment, slots: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    try:
        if environment.mode == "root":
            environment.uid_base = uid_base(slots)
            kernel.unshare(kernel.CLONE_NEWNS)
            return
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise StepError(
            "user namespace" if environment.mode == "userns" else "unshare", error
        ) from error
    environment.uid_base, environment.gid = uid, gid
    environment.notes.append(
        "jobs run as the agent's own user, which keeps its supplementary groups"
        if uid
        else "jobs run as this container's root user: run the agent as an ordinary user instead"
    )


def uid_base(slots: int) -> int:
    """First uid for jobs: the usual base if mapped here, else the top of the largest range."""
    best = (0, 0)
    for line in _read("/proc/self/uid_map").splitlines():
        inside, _, count = (int(word) for word in line.split())
        if inside <= UID_BASE and UID_BASE + slots <= inside + count:
            return UID_BASE
        best = max(best, (count, inside))
    count, inside = best
    first = inside + count - slots
    if first < _MAPPED_UID_MIN:
        raise OSError(1, f"this container maps too few uids for {slots} jobs at once")
    return first


def _network(environment: Environment) -> None:
    """An empty network namespace with its loopback down, made by a child that then goes away."""
    shared = environment.shared
    if shared.landlock_fd < 0:
        # Abstract unix sockets belong to the network namespace: without Landlock's scope two jobs
        # could meet there, so each job pays for one of its own.
        environment.notes.append("a network namespace per job: Landlock ABI 6 is not there")
        return
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(done_write)
        try:
            kernel.unshare(kernel.CLONE_NEWNET)
            os.write(ready_write, b"+")
        except OSError as error:
            os.write(ready_write, str(error.errno).encode())
        os.read(done_read, 1)  # until the parent has opened the namespace, or died
        os._exit(0)
    os.close(ready_write)
    os.close(done_read)
    answer = os.read(ready_read, 16)
    try:
        if answer != b"+":
            raise OSError(int(answer or b"0"), "unshare: no network namespace")
        shared.net_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StepError("network namespace", error) from error
    finally:
        os.close(done_write)
        os.close(ready_read)
        os.waitpid(pid, 0)


def _landlock(environment: Environment) -> None:
    if kernel.landlock_abi() >= kernel.LANDLOCK_ABI_SCOPED:
        environment.shared.landlock_fd = kernel.landlock_scope_ruleset()


def root_spec(settings: dict[str, object], *, keep_proc: bool = False) -> RootSpec:
    """What the agent's settings say that the root shows."""
    lists = {
        name: [str(item) for item in value]
        for name, value in settings.items()
        if isinstance(value, list)
    }
    return RootSpec(
        visible=lists["visible_paths"],
        etc=lists["etc_names"],
        extra_ro=lists["extra_ro_paths"],
        hidden=lists["hidden_paths"],
        devices=lists["devices"],
        keep_proc=keep_proc,
    )


def image_paths(settings: dict[str, object]) -> list[str]:
    """Directories that are, or that hold, roots which jobs may have in place of the usual one."""
    paths = settings["image_paths"]
    return [str(path) for path in paths] if isinstance(paths, list) else []


def _root(environment: Environment, settings: dict[str, object]) -> None:
    spec = root_spec(settings, keep_proc=environment.mode != "root")
    environment.shared.proc_beneath = spec.keep_proc
    environment.shared.has_devices = bool(spec.devices)
    images = environment.shared.images
    try:
        images.open(image_paths(settings))
        program_fd = rootfs.build(spec, PASSWD, GROUP, program())
        images.stage(keep_proc=spec.keep_proc)
    except OSError as error:
        raise StepError("read-only root", error) from error
    environment.notes += images.problems
    try:
        environment.shared.inits = Inits(environment.shared, program_fd)
    except OSError as error:
        raise StepError("zygote", error) from error
