"""What the faults act on: the processes of a run, its network, its disks, its clocks."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from chaos.faults import clock, network, wire
from chaos.faults.network import Network
from dataplane.broker import attach_broker
from dataplane.broker.local import LocalBroker
from idl.errors import ConfigError, PlatformFaultError
from node_agent.launcher.files import read_table, rows_of
from outrider.local.cluster import HERE, LocalCluster, Placement
from outrider.local.process import Identity, identity_of, is_alive, send_signal

DISK_BYTES: Final = 64 * 1024 * 1024
"""Size of the tmpfs that stands for the disk of the state directory: an agent wants 32 MiB free."""
DISK_SOURCE: Final = "outrider-chaos"
FILLER: Final = "filler"


@dataclass
class World:
    """A run's own cluster, or somebody's: then `cluster` is None and `pids` says what may be
    signalled."""

    folder: Path
    coordinators: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()
    cluster: LocalCluster | None = None
    network: Network | None = None
    pids: Mapping[str, Identity] = field(default_factory=dict)
    skewed: bool = False
    disk: Path | None = None
    leader: Callable[[], str] = lambda: ""

    # -- processes -------------------------------------------------------------------------------

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signals a process. Raises ConfigError where it is not there."""
        if self.cluster is not None:
            self.cluster.kill(name, number)
        elif name not in self.pids or not send_signal(self.pids[name], number):
            raise ConfigError(f"process {name!r} is not running, or was not given with --pid")

    def restart(self, name: str) -> None:
        """Starts it again. Raises ConfigError where we did not start it."""
        if self.cluster is None:
            raise ConfigError(f"{name} was not started by us and cannot be restarted")
        self.cluster.restart(name)

    def alive(self, name: str) -> bool:
        """Whether it runs (a paused one does)."""
        if self.cluster is not None:
            return self.cluster.run.process(name).alive
        return name in self.pids and is_alive(self.pids[name])

    def log(self, name: str) -> Path | None:
        """Its log, where we started it."""
        return None if self.cluster is None else Path(self.cluster.run.process(name).log)

    # -- clocks ----------------------------------------------------------------------------------

    def clock_file(self, name: str) -> Path:
        """What holds the offset of its wall clock."""
        return self.folder / f"clock-{name}"

    def placement(self, name: str) -> Placement:
        """Where LocalCluster puts a process: its namespace, and behind its clock."""
        found = HERE if self.network is None else self.network.placement(name)
        if not self.skewed:
            return found
        clock.write_offset(self.clock_file(name), 0)
        shift = (sys.executable, "-m", "chaos.faults.clock", str(self.clock_file(name)))
        return Placement(address=found.address, wrapper=(*found.wrapper, *shift))

    # -- broker ----------------------------------------------------------------------------------

    def broker(self) -> LocalBroker:
        """The broker that LocalCluster started. Raises ConfigError."""
        found = None if self.cluster is None else attach_broker(self.cluster.place.broker)
        if not isinstance(found, LocalBroker):
            raise ConfigError("the broker was not started by us")
        return found

    # -- disk ------------------------------------------------------------------------------------

    def mount_disk(self, path: Path) -> None:
        """A small tmpfs on `path`. Raises PlatformFaultError."""
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", DISK_SOURCE, str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise PlatformFaultError(f"cannot mount a small disk: {done.stderr.strip()}")
        self.disk = path

    def unmount_disk(self) -> None:
        """Removes it. Idempotent."""
        if self.disk is not None:
            subprocess.run(["umount", "-l", str(self.disk)], capture_output=True, check=False)
            self.disk = None


def unmount_left(folder: Path) -> list[str]:
    """Unmounts disks of ours below `folder`; what it unmounted."""
    gone = []
    for line in rows_of(read_table("/proc/self/mountinfo")):
        where, source = line.split()[4], line.split(" - ")[1].split()[1]
        if source == DISK_SOURCE and Path(where).is_relative_to(folder):
            subprocess.run(["umount", "-l", where], capture_output=True, check=False)
            gone.append(f"mount {where}")
    return gone


def parse_pids(given: tuple[str, ...]) -> dict[str, Identity]:
    """`NAME=PID …` → identities. Raises ConfigError."""
    found = {}
    for text in given:
        name, _, pid = text.partition("=")
        identity = identity_of(int(pid)) if pid.isdigit() else None
        if not name or identity is None:
            raise ConfigError(f"--pid {text!r}: write NAME=PID of a process that runs here")
        if identity.pid == os.getpid():
            raise ConfigError("--pid names this very process")
        found[name] = identity
    return found


def weather_unavailable() -> str:
    """Why delay, loss and duplication cannot be made here; "" where they can."""
    netem = network.netem_unavailable()
    own = wire.unavailable() if netem else ""
    return f"{netem}; {own}" if netem and own else ""


def unavailable(world: World, kind: str) -> str:
    """Why a kind of fault cannot be done to this world; "" where it can."""
    if world.cluster is None:
        if kind == "pause":
            return "" if world.pids else "no local process was given with --pid"
        return "the cluster was not started by us: only processes given with --pid can be paused"
    match kind:
        case "partition":
            return "" if world.network else "it needs network: namespaces"
        case "delay" | "loss" | "duplication":
            return weather_unavailable() if world.network else "it needs namespaces"
        case "disk_full":
            return "" if world.disk else "a small disk needs root"
        case _:
            return ""
