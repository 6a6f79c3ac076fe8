"""What this machine has free for a local cluster: ports, a DDS domain, a fair share per agent."""

import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from idl.errors import ConfigError, PlatformFaultError
from idl.topology import parse_cpu_quota
from idl.units import GIB, MIB, format_bytes

LOOPBACK: Final = "127.0.0.1"
DDS_DOMAIN_MAX: Final = 200
"""Beyond it the domain's UDP ports pass 57,700; the RTPS mapping ends at 65,535 (232)."""
_DOMAINS_BELOW_EPHEMERAL: Final = 100
"""Domains up to here keep their ports below 32,768, where outgoing connections pick theirs."""
_SPARE_DDS_PORTS: Final = 6
"""Participants beyond coordinators and agents: a console, an SDK that watches queue states."""
_CONTROL_PLANE_MEMORY: Final = GIB
"""Left to broker and coordinators where the machine has four times that, else a quarter."""
_MEMORY_GRAIN: Final = 64 * MIB


class Share(NamedTuple):
    """What one agent offers to jobs."""

    cpu_millis: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.cpu_millis / 1000:g} CPU, {format_bytes(self.memory_bytes)} memory"


def coordinator_dds_port(domain: int, index: int) -> int:
    """Unicast discovery port of participant `index` (RTPS 9.6.1.1: PB + DG·domain + d1 + PG·i)."""
    return 7410 + 250 * domain + 2 * index


def _can_bind(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_dds_domain(participants: int, start: int) -> int:
    """The first domain from `start` on (mod 101, then the rest) whose UDP ports can be bound.

    Participants take two ports each (discovery, data). Raises PlatformFaultError.
    """
    low = _DOMAINS_BELOW_EPHEMERAL + 1
    order: list[int] = [
        *((start + step) % low for step in range(low)),
        *range(low, DDS_DOMAIN_MAX + 1),
    ]
    for domain in order:
        first = coordinator_dds_port(domain, 0)
        ports = range(first, first + 2 * (participants + _SPARE_DDS_PORTS))
        if all(_can_bind(port, socket.SOCK_DGRAM) for port in ports):
            return domain
    raise PlatformFaultError(
        f"no DDS domain from 0 to {DDS_DOMAIN_MAX} has its UDP ports free; "
        "stop other DDS programs on this machine"
    )


def free_tcp_ports(count: int) -> list[int]:
    """`count` different ports that were free on loopback just now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def host_cpus(cgroup_root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that this process may run on, or less where this container has a quota of CPU time."""
    v1 = [_text(cgroup_root / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    quotas = map(parse_cpu_quota, (_text(cgroup_root / "cpu.max"), " ".join(v1)))
    return min([len(os.sched_getaffinity(0)), *(millis / 1000 for millis in quotas if millis)])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cgroup_limits(root: Path) -> Iterable[int]:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(root / name).strip()
        if text.isdigit():
            yield int(text)


def host_memory_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Physical memory, or less where the cgroup of this container allows less."""
    total = int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    return min([total, *_cgroup_limits(cgroup_root)])


def share_of_host(
    agents: int,
    *,
    cpus: float,
    memory_bytes: int,
    cpu_millis: int | None = None,
    node_memory_bytes: int | None = None,
    overcommit: bool = False,
) -> Share:
    """What each of `agents` offers. Raises ConfigError where the sum exceeds the host.

    Default: the CPUs divided evenly, in hundredths; memory too, less what the control plane needs.
    """
    usable = memory_bytes - min(_CONTROL_PLANE_MEMORY, memory_bytes // 4)
    even_cpu = max(10, int(cpus * 1000) // agents // 10 * 10)
    even_memory = max(_MEMORY_GRAIN, usable // agents // _MEMORY_GRAIN * _MEMORY_GRAIN)
    share = Share(
        even_cpu if cpu_millis is None else cpu_millis,
        even_memory if node_memory_bytes is None else node_memory_bytes,
    )
    too_much = share.cpu_millis * agents > cpus * 1000, share.memory_bytes * agents > memory_bytes
    if any(too_much) and not overcommit:
        raise ConfigError(
            f"{agents} agents with {share} each exceed this machine ({cpus:g} CPU, "
            f"{format_bytes(memory_bytes)}); offer less or say --overcommit"
        )
    return share
