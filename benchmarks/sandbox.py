"""One sandbox for `/bin/true`, from start to reaped: ours beside bubblewrap, crun, runc and none.

All variants run in one process and in turn, a few at a time, so that a noisy machine is noisy for
all of them. `posix_spawn` is the floor: no isolation. What each variant isolates is in the table;
no two tools can do exactly the same, and where one does less it says so. CPU is that of all
processes of the variant (launcher, init, job, the tool itself; `agent` is our asyncio side, on
uvloop as in the agent, which the others' bare waitpid loop has no equal of), not the kernel's
workers, which `machine` includes, as it does whatever else runs here.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import platform
import resource
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from node_agent.launcher import kernel
from node_agent.sandbox import seccomp
from node_agent.sandbox.native import NativeSandbox
from node_agent.sandbox.plan import MIB, SandboxPlan, SandboxUnavailable
from node_agent.sandbox.settings import SandboxSettings

COMMAND: Final = "/bin/true"
ROUNDS: Final = 5
RUNS_PER_ROUND: Final = 40
CONCURRENCY: Final = (1, 2, 4)
WARM_UP: Final = 5
SLEEPERS: Final = 8
"""Jobs at once while memory is measured."""
_CLOCK_TICK_MS: Final = 1000 / os.sysconf("SC_CLK_TCK")
_PLAN: Final = SandboxPlan(key="x", argv=(COMMAND,))
_FLOOR_NAME: Final = "posix_spawn"
_NATIVE_ISOLATES: Final = "namespaces (pid mnt ipc uts net cgroup user), seccomp, no caps, tmpfs"


class Sample(msgspec.Struct):
    """What one variant did at one concurrency, added up over the rounds; times in ms."""

    times: list[float] = []
    wall_s: float = 0.0
    cpu_ms: float = 0.0
    agent_cpu_ms: float = 0.0
    machine_cpu_ms: float = 0.0


class Figures(msgspec.Struct, kw_only=True):
    """One variant's figures; times and CPU in ms, CPU per job at a concurrency of one."""

    name: str
    isolates: str
    median_ms: float
    p99_ms: float
    per_s: dict[int, float]
    cpu_ms: float
    agent_cpu_ms: float
    machine_cpu_ms: float
    memory: str = ""


class Variant:
    """One way to run a program. The base class starts an outside command for each."""

    def __init__(self, name: str, isolates: str, argv: list[str]) -> None:
        self.name, self.isolates, self._argv = name, isolates, argv
        self.memory = ""
        self.actions: list[tuple[Any, ...]] = []
        self._sequence = 0

    def argv(self) -> list[str]:
        """The next command line."""
        self._sequence += 1
        return [word.replace("{n}", str(self._sequence)) for word in self._argv]

    def cpu_ms(self) -> float:
        """CPU that all processes of this variant used so far."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (used.ru_utime + used.ru_stime) * 1000

    async def burst(self, jobs: int, concurrency: int) -> list[float]:
        """Start-to-reaped of each. Raises RuntimeError if one fails."""
        return self._start_and_wait(jobs, concurrency)

    def _start_and_wait(self, jobs: int, concurrency: int) -> list[float]:
        times: list[float] = []
        running: dict[int, float] = {}
        while len(times) < jobs:
            while len(running) < concurrency and len(times) + len(running) < jobs:
                argv, begun = self.argv(), time.perf_counter()
                pid = os.posix_spawn(argv[0], argv, {}, file_actions=self.actions)
                running[pid] = begun
            pid, status = os.wait()
            times.append((time.perf_counter() - running.pop(pid)) * 1000)
            if status:
                raise RuntimeError(f"{self.name} failed: {os.waitstatus_to_exitcode(status)}")
        return times

    async def measure_memory(self) -> None:
        """Sets ``memory`` where there is something to say."""


class Native(Variant):
    """Our own, through the agent's side."""

    def __init__(self, name: str, sandbox: NativeSandbox) -> None:
        held = sandbox.enforcement
        cgroups = f"; cgroup {held.cgroup}: memory pids cpu" if held.cgroup != "none" else ""
        super().__init__(name, _NATIVE_ISOLATES + cgroups, [])
        self._sandbox = sandbox

    def cpu_ms(self) -> float:
        text = Path(f"/proc/{self._sandbox.launcher_pid}/stat").read_text()
        return sum(int(word) for word in text.rpartition(")")[2].split()[11:15]) * _CLOCK_TICK_MS

    async def burst(self, jobs: int, concurrency: int) -> list[float]:
        gate = asyncio.Semaphore(concurrency)

        async def one(key: str) -> float:
            async with gate:
                begun = time.perf_counter()
                outcome = await self._sandbox.run(self._plan(key, COMMAND), b"")
                if outcome.exit_code != 0:
                    raise RuntimeError(f"{self.name} failed: {outcome}")
                return (time.perf_counter() - begun) * 1000

        return await asyncio.gather(*(one(self._key()) for _ in range(jobs)))

    async def measure_memory(self) -> None:
        """The launcher's, and that of a sandbox besides its job, with some jobs running."""
        agent, launcher = _private_kib(os.getpid()), _private_kib(self._sandbox.launcher_pid)
        started = [asyncio.Event() for _ in range(SLEEPERS)]
        tasks = [
            asyncio.create_task(
                self._sandbox.run(self._plan(self._key(), "/bin/sleep", "60"), b"", None, event.set)
            )
            for event in started
        ]
        await asyncio.gather(*(event.wait() for event in started))
        zygote, *inits = sorted(_children(self._sandbox.launcher_pid))
        each = statistics.mean(_private_kib(pid) for pid in inits)
        here = (_private_kib(os.getpid()) - agent) / SLEEPERS
        self.memory = (
            f"launcher {launcher / 1024:.1f} MiB of its own; a running job's init "
            f"{each:.0f} KiB; zygote {_private_kib(zygote)} KiB; in the agent {here:.0f} KiB a job"
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _key(self) -> str:
        self._sequence += 1
        return f"b{self._sequence}"

    def _plan(self, key: str, *argv: str) -> SandboxPlan:
        enforced = self._sandbox.enforcement.enforced
        return msgspec.structs.replace(_PLAN, key=key, argv=argv, require=enforced)


def _private_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


# --- the others ------------------------------------------------------------------------------
def bubblewrap(folder: Path) -> Variant:
    """All it can: no cgroup limits."""
    filter_path = folder / "seccomp.bpf"
    filter_path.write_bytes(seccomp.encode(seccomp.build_filter(platform.machine())))
    argv = [_tool("bwrap"), "--unshare-all", "--uid", "1000", "--gid", "1000"]
    argv += ["--hostname", "job", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in SandboxSettings().visible_paths:
        if Path(path).is_symlink():
            argv += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists():
            argv += ["--ro-bind", path, path]
    argv += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    for path, size in (("/dev/shm", 64), ("/tmp", 64), ("/work", 256)):
        argv += ["--size", str(size * MIB), "--tmpfs", path]
    argv += ["--chdir", "/work", "--seccomp", "9", COMMAND]
    variant = Variant("bubblewrap", "the same, without any cgroup", argv)
    variant.actions = [(os.POSIX_SPAWN_OPEN, 9, str(filter_path), os.O_RDONLY, 0)]
    return variant


def oci(name: str, folder: Path) -> Variant:
    """crun or runc with a bundle as near to ours as a config.json comes."""
    bundle = folder / name
    rootfs = bundle / "rootfs"
    rootfs.mkdir(parents=True)
    for path in ("proc", "dev", "tmp", "work"):  # its root may not: it is an ordinary user here
        (rootfs / path).mkdir()
    mounts = [
        _mount("/proc", "proc", []),
        _mount("/dev", "tmpfs", ["nosuid", "size=64k", "mode=755"]),
    ]
    for path, size in (("/dev/shm", 64), ("/tmp", 64), ("/work", 256)):
        mounts.append(_mount(path, "tmpfs", ["nosuid", "nodev", f"size={size * MIB}"]))
    for path in SandboxSettings().visible_paths:
        if Path(path).is_symlink():
            (rootfs / path[1:]).symlink_to(Path(path).readlink())
        elif Path(path).exists():
            options = ["rbind", "ro", "nosuid", "nodev"]
            (rootfs / path[1:]).mkdir()
            mounts.append(_mount(path, "bind", options, path))
    (bundle / "config.json").write_text(json.dumps(_oci_config(mounts)))
    state = folder / f"{name}-state"
    isolates = "the same, with cgroups: memory pids cpu, and devices"
    run = [_tool(name), "--root", str(state), "run", "--bundle", str(bundle), f"bench-{name}-{{n}}"]
    variant = Variant(name, isolates, run)
    # Pipes, as jobs have: crun gives its standard streams to the container's user, and where ours
    # are the null device that would be the host's.
    nothing, no_more = os.pipe()
    os.close(no_more)
    _, sink = os.pipe()  # what little is said stays in it
    variant.actions = [
        (os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((nothing, 0), (sink, 1), (sink, 2))
    ]
    return variant


def _mount(target: str, kind: str, options: list[str], source: str = "") -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source or kind, "options": options}


def _oci_config(mounts: list[dict[str, Any]]) -> dict[str, Any]:
    namespaces = ("pid", "network", "ipc", "uts", "mount", "cgroup", "user")
    table = seccomp.known_syscalls(platform.machine())
    allowed = sorted(set(table) - set(seccomp._DENIED.split()))
    ids = [{"containerID": 0, "hostID": 1_879_048_192, "size": 65_536}]
    quota = {"quota": 100_000, "period": 100_000}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "args": [COMMAND],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/work",
            "noNewPrivileges": True,
            "capabilities": {},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "job",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "uidMappings": ids,
            "gidMappings": ids,
            "maskedPaths": ["/proc/keys", "/proc/kallsyms", "/proc/interrupts", "/proc/acpi"],
            "resources": {
                "memory": {"limit": _PLAN.memory_bytes},
                "pids": {"limit": _PLAN.pids_max},
                "cpu": quota,
            },
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": [f"SCMP_ARCH_{platform.machine().upper()}"],
                "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}],
            },
        },
    }


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed (Debian: apt-get install {name})")
    return found


def _hide_v2_controllers() -> None:
    """crun 1.8 refuses a hybrid host whose v2 hierarchy has controllers: in a mount namespace of
    our own it sees none. Only as root."""
    listed = Path("/sys/fs/cgroup/unified/cgroup.controllers")
    if os.geteuid() == 0 and listed.exists():
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("/dev/null", str(listed), "", kernel.MS_BIND)


# --- measuring -------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def variants(folder: Path, console: Console) -> AsyncIterator[list[Variant]]:
    """Those that this machine has; one line for each that it has not."""
    found: list[Variant] = [Variant(_FLOOR_NAME, "nothing", [COMMAND])]
    opened: list[NativeSandbox] = []
    modes: tuple[Literal["root", "userns"], ...] = (
        ("root", "userns") if os.geteuid() == 0 else ("userns",)
    )
    try:
        for mode in modes:
            settings = SandboxSettings(instance=f"bench-{os.getpid()}", mode=mode)
            try:
                opened.append(await NativeSandbox.start(settings))
            except SandboxUnavailable as error:
                console.print(f"outrider-{mode} not measured: {error}")
                continue
            found.append(Native(f"outrider-{mode}", opened[-1]))
        for make in (
            functools.partial(bubblewrap, folder),
            functools.partial(oci, "crun", folder),
            functools.partial(oci, "runc", folder),
        ):
            with _skipped(console):
                variant = make()
                await variant.burst(1, 1)
                found.append(variant)
        yield found
    finally:
        for sandbox in opened:
            await sandbox.close()


@contextlib.contextmanager
def _skipped(console: Console) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, RuntimeError, subprocess.SubprocessError) as error:
        console.print(f"not measured: {error}")


async def _sample(variant: Variant, jobs: int, concurrency: int, into: Sample) -> None:
    machine, cpu, agent = _machine_ms(), variant.cpu_ms(), time.process_time()
    begun = time.perf_counter()
    into.times += await variant.burst(jobs, concurrency)
    into.wall_s += time.perf_counter() - begun
    into.cpu_ms += variant.cpu_ms() - cpu
    into.agent_cpu_ms += (time.process_time() - agent) * 1000
    into.machine_cpu_ms += _machine_ms() - machine


def _machine_ms() -> float:
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle, iowait = fields[3:5]
    return (sum(fields[:8]) - idle - iowait) * _CLOCK_TICK_MS


async def measure(folder: Path, rounds: int, runs: int, console: Console) -> list[Figures]:
    """Figures of every variant there is."""
    samples: dict[tuple[str, int], Sample] = {}
    async with variants(folder, console) as found:
        for variant in found:
            await variant.measure_memory()
            await variant.burst(WARM_UP, 1)
        for number in range(rounds):
            console.print(f"[dim]round {number + 1} of {rounds}[/dim]")
            turn = deque(found)
            turn.rotate(number)
            for variant in turn:
                for concurrency in CONCURRENCY:
                    sample = samples.setdefault((variant.name, concurrency), Sample())
                    await _sample(variant, runs, concurrency, sample)
        return [_figures(variant, samples) for variant in found]


def _figures(variant: Variant, samples: dict[tuple[str, int], Sample]) -> Figures:
    alone = samples[variant.name, 1]
    jobs = len(alone.times)
    per_s = {}
    for concurrency in CONCURRENCY:
        sample = samples[variant.name, concurrency]
        per_s[concurrency] = len(sample.times) / sample.wall_s
    return Figures(
        name=variant.name,
        isolates=variant.isolates,
        median_ms=statistics.median(alone.times),
        p99_ms=sorted(alone.times)[int(jobs * 0.99)],
        per_s=per_s,
        cpu_ms=alone.cpu_ms / jobs,
        agent_cpu_ms=alone.agent_cpu_ms / jobs,
        machine_cpu_ms=alone.machine_cpu_ms / jobs,
        memory=variant.memory,
    )


def _show(found: list[Figures], jobs: int) -> None:
    title = f"{COMMAND}, start to reaped, {jobs} runs each, {os.cpu_count()} CPUs"
    table = Table(title=f"{title}, Linux {platform.release()}")
    heads = ("variant", "median ms", "p99", *(f"/s at {c}" for c in CONCURRENCY))
    for head in (*heads, "CPU ms", "agent", "machine"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    for figures in found:
        speeds = [f"{figures.per_s[c]:.0f}" for c in CONCURRENCY]
        cpu = (figures.cpu_ms, figures.agent_cpu_ms, figures.machine_cpu_ms)
        table.add_row(
            figures.name,
            f"{figures.median_ms:.2f}",
            f"{figures.p99_ms:.1f}",
            *speeds,
            *(f"{value:.2f}" for value in cpu),
        )
    console = Console(width=120)
    console.print(table)
    for figures in found:
        console.print(f"{figures.name}: isolates {figures.isolates}")
        if figures.memory:
            console.print(f"  memory: {figures.memory}")


def main(argv: list[str] | None = None) -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--runs", type=int, default=RUNS_PER_ROUND, help="per round and variant")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    _hide_v2_controllers()
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as text:
        folder = Path(text)
        folder.chmod(
            stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH
        )  # an OCI container's root is not us
        say = Console(stderr=True)
        found = uvloop.run(measure(folder, options.rounds, options.runs, say))
    if options.json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(found, options.rounds * options.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
