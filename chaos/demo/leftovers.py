"""What a run must not leave behind: processes, cgroups, mounts. Compared before and after."""

import os
from pathlib import Path
from typing import Final

import msgspec

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OWN_PREFIX: Final = "outrider"


class Leftovers(msgspec.Struct, frozen=True):
    """One look at the machine."""

    processes: frozenset[tuple[int, str]]
    cgroups: frozenset[str]
    mounts: frozenset[str]

    @staticmethod
    def new(before: "Leftovers", after: "Leftovers") -> list[str]:
        """What is there now and was not, in words."""
        return [
            *(f"process left behind: {pid} {c}" for pid, c in after.processes - before.processes),
            *(f"cgroup left behind: {path}" for path in sorted(after.cgroups - before.cgroups)),
            *(f"mount left behind: {line}" for line in sorted(after.mounts - before.mounts)),
        ]


def _processes() -> frozenset[tuple[int, str]]:
    """Our own user's processes that are coordinators, agents, launchers, brokers or jobs."""
    found: set[tuple[int, str]] = set()
    marks = ("controlplane.coordinator", "node_agent", "tansu", "kafka.Kafka", "OUTRIDER_")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            )
        except OSError:
            continue  # it ended while we looked
        if any(mark in command for mark in marks):
            found.add((int(folder.name), command[:120]))
    return frozenset(found)


def _cgroups() -> frozenset[str]:
    return frozenset(
        folder for folder, _, _ in os.walk(CGROUP_ROOT) if Path(folder).name.startswith(OWN_PREFIX)
    )


def _mounts() -> frozenset[str]:
    """Mount points and types of this namespace (proc(5), mountinfo fields 5 and 9)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return frozenset(f"{line.split()[4]} {line.split(' - ')[1].split()[0]}" for line in lines)


def look() -> Leftovers:
    """The machine as it is."""
    return Leftovers(_processes(), _cgroups(), _mounts())
