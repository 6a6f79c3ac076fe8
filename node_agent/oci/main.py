# ruff: noqa: PTH101, PTH102, PTH103, PTH123
# pathlib would add a third to the memory that every job's fork copies.
"""The OCI launcher: the native launcher's loop and protocol, jobs run by a container runtime.

It stays outside of every root, because runtimes must find the host; that is why jobs never see its
directory, and why it runs nothing but the runtime. Adoption by a later agent, kept ends, streams,
deadlines are the native launcher's own (ADR 0006, ADR 0009).
"""

from __future__ import annotations

import os
import select
import shutil
import sys

from node_agent.launcher import kernel, probe, rootfs, setup
from node_agent.launcher.cgroups import PREFIX, find_hierarchies, open_tree, remove_dead
from node_agent.launcher.child import JobSpec, Shape
from node_agent.launcher.doors import Doors
from node_agent.launcher.files import read_table
from node_agent.launcher.jobs import Job
from node_agent.launcher.limits import ON_DEMAND_V1, Limits
from node_agent.launcher.main import Launcher
from node_agent.launcher.main import main as serve
from node_agent.launcher.rootfs import StepError
from node_agent.launcher.setup import Environment
from node_agent.oci import cgroups as confined
from node_agent.oci.children import Children
from node_agent.oci.job import OciJob, OciShared
from node_agent.oci.runtime import Runtime

_PROBE_PREFIX = "/tmp/.python"  # jobs never see it: their own /tmp covers it


class OciEnvironment(Environment):
    """Everything set up once, and what only this launcher has."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: OciShared
        self.strays: list[confined.Stray] = []


def prepare(settings: dict[str, object], slots: int, agent_pid: int) -> OciEnvironment:
    """Set the launcher up. Raises StepError with the step that failed."""
    oci = settings["oci"]
    assert isinstance(oci, dict)
    runtime = Runtime(*oci["runtime"])
    environment = OciEnvironment()
    environment.mode = setup.mode_of("root")
    environment.uid_base = setup.uid_base(slots)
    shared = environment.shared = OciShared(runtime, str(oci["home"]))
    shared.seccomp = bytes.fromhex(str(settings["seccomp"]))
    shared.profile = oci["profile"]
    with open("/proc/sys/kernel/cap_last_cap", encoding="utf-8") as file:
        shared.last_cap = int(file.read())
    shared.masked = [path for paths in rootfs.masked_paths() for path in paths]
    if runtime.note:
        environment.notes.append(runtime.note)
    environment.notes.append("no Landlock and no user namespace: the runtime has neither for us")
    try:
        # Containers whose runtime has gone are ours to wait for; prctl(2).
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        shared.children = Children()
    except OSError as error:
        raise StepError("children of a kernel with CONFIG_PROC_CHILDREN", error) from error
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        _folders(shared)
        rootfs.assemble(setup.root_spec(settings), shared.root, setup.PASSWD, setup.GROUP)
        for path in ("/dev/shm", _PROBE_PREFIX):  # gVisor makes no mount points below a tmpfs
            os.mkdir(shared.root + path)
        flags = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
        kernel.mount_setattr(kernel.AT_FDCWD, shared.root, kernel.AT_RECURSIVE, flags)
        shared.images.open(setup.image_paths(settings))
    except OSError as error:
        raise StepError("read-only root", error) from error
    environment.notes += shared.images.problems
    _cgroups(environment, settings, agent_pid)
    _probe_mounts(shared)
    return environment


def _folders(shared: OciShared) -> None:
    """Ours alone, and empty: what a dead launcher left there is mounted nowhere any more."""
    for path in (shared.bundles, shared.state, shared.root, shared.empty):
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path, mode=0o700)
    for path in (shared.root, shared.empty):
        os.chmod(path, 0o755)


def _cgroups(environment: OciEnvironment, settings: dict[str, object], agent_pid: int) -> None:
    mountinfo, own = read_table("/proc/self/mountinfo"), read_table("/proc/self/cgroup")
    parent = str(settings["cgroup_parent"])
    name = f"{PREFIX}{settings['instance']}.{os.urandom(4).hex()}"
    used = find_hierarchies(mountinfo, own, parent)
    environment.shared.tree = environment.tree = open_tree(
        name, used, frozenset((agent_pid, os.getpid()))
    )
    if environment.tree.problems:
        problems = "; ".join(environment.tree.problems)
        environment.tree.remove()
        raise StepError("cgroups", OSError(0, f"a runtime needs all of them: {problems}"))
    setup.look_for_disks(environment, settings)
    setup.look_for_swap(environment)
    directories = confined.own_directories(mountinfo, own, parent)
    try:
        environment.strays = confined.confine(directories, name)
    except OSError as error:
        environment.tree.remove()
        raise StepError("cgroups", error) from error


def _probe_mounts(shared: OciShared) -> None:
    """The self-test needs our interpreter, which the root shows only where it is under /usr."""
    prefix = os.path.realpath(sys.base_prefix)
    if not f"{prefix}/".startswith(("/usr/", "/opt/")):
        options = ["rbind", "ro", "nosuid", "nodev"]
        shared.probe_mounts = [
            {"destination": _PROBE_PREFIX, "type": "bind", "source": prefix, "options": options}
        ]


def _probe_command(pids_max: int, own_kernel: bool) -> list[str]:
    prefix = os.path.realpath(sys.base_prefix)
    seen = prefix if f"{prefix}/".startswith(("/usr/", "/opt/")) else _PROBE_PREFIX
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    with open(probe.__file__, encoding="utf-8") as file:
        source = file.read()
    wait = (
        ""
        if own_kernel
        else f"for _ in range({_LOOKS}):\n"
        "    if os.path.exists('/work/go'): break\n    time.sleep(0.02)\n"
    )
    return [
        f"{seen}/bin/{version}", "-I", "-S", "-c",
        f"{source}\n{wait}os._exit(inside({pids_max}))",
    ]  # fmt: skip


# The self-test waits this many times 20 ms for us to look at its cgroups.
_LOOKS = 250


class OciLauncher(Launcher):
    """Owns the jobs of one agent, each a container."""

    _env: OciEnvironment

    def __init__(self, doors: Doors, environment: Environment, settings: dict[str, object]) -> None:
        super().__init__(doors, environment, settings)
        self._poll.register(self._env.shared.children.signal_fd, select.EPOLLIN)

    @staticmethod
    def set_up(settings: dict[str, object], slots: int, agent_pid: int) -> OciEnvironment:
        """See `prepare`."""
        return prepare(settings, slots, agent_pid)

    def _make(self, shape: Shape) -> Job:
        self._check_room()
        self._env.shared.images.ready(shape.image)
        self._sequence += 1
        name = f"j{self._sequence}"
        wanted = Limits(0, 0, 0, shape.io, shape.cpus, shape.mems).on_demand
        cgroup = self._env.tree.make(name, ON_DEMAND_V1 if shape.probe else wanted)
        try:
            cgroup.hold()
            job = OciJob(shape, self._free_slots[-1], cgroup, name)
        except OSError:
            cgroup.close_watch()
            cgroup.remove()
            raise
        self._free_slots.pop()
        return job

    def _to_prepare(self) -> None:
        """Nothing is made ahead: the runtime's part cannot be, and it is the larger one."""

    def _launch(self, spec: JobSpec, stdio: list[int]) -> Job:
        """Takes ``stdio`` unless it raises OSError."""
        if spec.shape.probe:
            spec.argv = _probe_command(spec.pids_max, self._env.shared.runtime.own_kernel)
        job = super()._launch(spec, stdio)
        self._follow(job)
        return job

    def _follow(self, job: Job) -> None:
        """Watch what the job now consists of: our init, the runtime, the container, our init."""
        assert isinstance(job, OciJob)
        for fd in job.spent:
            self._forget_fd(fd)
            if fd != job.pidfd:
                job.drop(fd)
        job.spent.clear()
        if job.pidfd >= 0 and job.pidfd not in self._by_fd:
            self._by_fd[job.pidfd] = (job, "exit")
            self._poll.register(job.pidfd, select.EPOLLIN)

    def _release(self, job: Job) -> None:
        """A number that stays watched is the next job's, whose end would never be seen."""
        self._follow(job)
        super()._release(job)

    def _on_ready(self, fd: int) -> None:
        children = self._env.shared.children
        if fd == children.signal_fd:
            children.reap_strangers()
        else:
            super()._on_ready(fd)

    def describe(self, outcome: dict[str, object]) -> dict[str, object]:
        """What the self-test saw of its own cgroups, not what was asked of the runtime."""
        hello = super().describe(outcome)
        shared = self._env.shared
        found = shared.found
        hello["backend"] = f"{shared.runtime.name} {shared.runtime.version}"
        hello["holds"] = sorted(found.holds) if found else []
        hello["device_filter"] = found.device_filter if found else "none"
        problems = hello["cgroup_problems"]
        assert isinstance(problems, list)
        problems.append(f"the self-test did not find its container in this cgroup, {found}")
        return hello

    def _remove_all(self) -> None:
        groups = list(self._env.tree.v1.values())
        # No job is left: these are `<runtime> delete`s, of records that go with their folder.
        self._env.shared.children.kill_all()
        super()._remove_all()
        for group in groups:  # a runtime also makes /<job> where only some jobs need it
            if group.fd >= 0:
                remove_dead(group.parent_fd, group.name, group.fd)
        self._env.shared.children.end_all()
        for stray in self._env.strays:
            stray.remove()
        shared = self._env.shared
        shared.images.close()
        kernel.umount(shared.root)
        shutil.rmtree(shared.home, ignore_errors=True)


def main(agent_fd: int, listener_fd: int) -> int:
    """Entry point, as the native launcher's."""
    return serve(agent_fd, listener_fd, OciLauncher)
