"""A network of namespaces: one for each coordinator and agent and one for the broker, each joined
by a veth pair to a bridge (ip-netns(8), veth(4)); and faults on it. Root only.

Delay, loss and duplication are made by tc-netem(8) where the kernel has it, else by a process of
ours that is spliced in between a member's veth and the bridge (`chaos.faults.wire`).

A partition is made with permanent neighbour entries that hold a MAC address nobody has
(ip-neighbour(8)): the sender's frames go to the bridge and no further, in silence, in that
direction only, for UDP and open TCP connections alike. It needs neither netfilter nor a qdisc.

Every name starts with `oc<pid>`, so that `sweep` finds what a crashed run left.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from chaos.faults.wire import Counts, Weather, Wire
from dataplane.broker.embedded import EmbeddedBroker
from idl.errors import PlatformFaultError
from outrider.local.cluster import Placement

COMMAND_TIMEOUT_S: Final = 10.0
INTERFACE: Final = "eth0"
"""The same name in every namespace, so that one cluster file serves all."""
NOBODY: Final = "02:00:00:00:00:66"
"""A locally administered MAC address that no interface here has."""
BROKER: Final = "broker"
BROKER_HOST, COORDINATOR_HOST, AGENT_HOST = 2, 11, 101
"""Last byte of the addresses; 1 is the bridge, where the harness itself looks on."""
SUBNETS: Final = tuple(range(40, 240))
_NAME: Final = re.compile(r"^oc(\d+)(?:-[A-Za-z0-9]+|br)$")


def ip(*arguments: str, check: bool = True) -> str:
    """Runs ip(8). Raises PlatformFaultError with what it said."""
    try:
        done = subprocess.run(
            ["ip", *arguments], capture_output=True, text=True, check=False,
            timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlatformFaultError(f"ip {' '.join(arguments)}: {error}") from error
    if check and done.returncode != 0:
        raise PlatformFaultError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _rows(*arguments: str) -> list[dict[str, Any]]:
    text = ip("-j", *arguments, check=False).strip()
    found: list[dict[str, Any]] = json.loads(text) if text else []
    return found


def own_prefix() -> str:
    """What the names of this process's namespaces and links begin with."""
    return _prefix(os.getpid())


def _prefix(pid: int | str) -> str:
    return f"oc{pid}"


def unavailable() -> str:
    """Why namespaces cannot be had here; "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: iproute2, util-linux)"
    probe = f"{own_prefix()}-probe"
    try:
        ip("netns", "add", probe)
        ip("-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        ip("-n", probe, "link", "add", "b0", "type", "bridge")
    except PlatformFaultError as error:
        return f"this kernel has not all that it takes ({error})"
    finally:
        ip("netns", "del", probe, check=False)
    return ""


def netem_unavailable() -> str:
    """Why delay, loss and duplication cannot be made here; "" where they can (tc-netem(8))."""
    if os.geteuid() != 0 or shutil.which("tc") is None:
        return "delay, loss and duplication need root and tc (Debian: iproute2)"
    probe = f"{own_prefix()}-probe"
    try:
        ip("netns", "add", probe)
        ip("-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        tc(probe, "add", "v0", "netem", "delay", "1ms")
    except PlatformFaultError as error:
        return f"this kernel has no sch_netem ({str(error).rpartition(': ')[2]})"
    finally:
        ip("netns", "del", probe, check=False)
    return ""


def tc(namespace: str, verb: str, device: str, *arguments: str) -> None:
    """`tc qdisc VERB dev DEVICE root …` in a namespace. Raises PlatformFaultError."""
    done = subprocess.run(
        ["tc", "-n", namespace, "qdisc", verb, "dev", device, "root", *arguments],
        capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise PlatformFaultError(f"tc qdisc {verb} {device}: {done.stderr.strip()}")


class Network:
    """The namespaces of one run. `up` makes them, `down` removes them; both may be repeated."""

    def __init__(self, coordinators: Sequence[str], agents: Sequence[str]) -> None:
        self.prefix = own_prefix()
        self._wires: dict[str, Wire] = {}
        self._subnet = _free_subnet(os.getpid())
        self.hosts: dict[str, int] = {BROKER: BROKER_HOST}
        self.hosts |= {name: COORDINATOR_HOST + i for i, name in enumerate(coordinators)}
        self.hosts |= {name: AGENT_HOST + i for i, name in enumerate(agents)}

    def address(self, name: str) -> str:
        """IPv4 address of a member."""
        return f"{self._subnet}.{self.hosts[name]}"

    def namespace(self, name: str) -> str:
        """Name of its namespace."""
        return f"{self.prefix}-{name}"

    def placement(self, name: str) -> Placement:
        """How LocalCluster starts a member in its namespace."""
        return Placement(address=self.address(name), wrapper=self.enter(name))

    def enter(self, name: str) -> tuple[str, ...]:
        """argv in front of a command. Not `ip netns exec`: that would hide the cgroups in /sys."""
        nsenter = shutil.which("nsenter") or "nsenter"
        return (nsenter, f"--net=/run/netns/{self.namespace(name)}")

    def up(self) -> None:
        """Makes all of it. Raises PlatformFaultError."""
        bridge = f"{self.prefix}br"
        ip("link", "add", bridge, "type", "bridge")
        ip("address", "add", f"{self._subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for name in self.hosts:
            space, outer = self.namespace(name), self.namespace(name)
            ip("netns", "add", space)
            ip("link", "add", outer, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            ip("link", "set", outer, "master", bridge, "up")
            ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", INTERFACE)
            ip("-n", space, "link", "set", INTERFACE, "up")
            ip("-n", space, "link", "set", "lo", "up")

    def down(self) -> None:
        """Removes all of it, whatever is there."""
        for name in list(self._wires):
            self.unsplice(name)
        remove(self.prefix)

    def splice(self, name: str, weather: Weather) -> None:
        """From now on a wire of ours carries what goes to and from a member, badly.

        The member's veth leaves the bridge; a second pair takes its place there, and the wire joins
        the two. Raises PlatformFaultError; `unsplice` undoes whatever was done."""
        outer, bridge = self.namespace(name), f"{self.prefix}br"
        near, far = self._splice_names(name)
        wire = self._wires[name] = Wire(outer, far, weather)
        ip("link", "add", near, "type", "veth", "peer", "name", far)
        for interface in (outer, far):
            _deafen(interface)
        ip("link", "set", near, "master", bridge, "up")
        ip("link", "set", far, "up")
        ip("link", "set", outer, "nomaster")
        wire.begin()

    def unsplice(self, name: str) -> Counts:
        """The kernel carries again; what the wire counted. Nothing where there was none."""
        wire = self._wires.pop(name, None)
        if wire is None:
            return Counts()
        try:
            return wire.close()
        finally:
            ip("link", "set", self.namespace(name), "master", f"{self.prefix}br", check=False)
            ip("link", "del", self._splice_names(name)[0], check=False)

    def _splice_names(self, name: str) -> tuple[str, str]:
        """At the bridge, and at the wire. IFNAMSIZ leaves 15 characters."""
        return f"{self.prefix}-w{self.hosts[name]}a", f"{self.prefix}-w{self.hosts[name]}b"

    def cut(self, source: str, target: str) -> None:
        """Nothing that `source` sends reaches `target` any more."""
        ip("-n", self.namespace(source), "neighbour", "replace", self.address(target),
           "lladdr", NOBODY, "dev", INTERFACE, "nud", "permanent")  # fmt: skip

    def join(self, source: str, target: str) -> None:
        """Undoes `cut`; nothing where there was none."""
        ip("-n", self.namespace(source), "neighbour", "del", self.address(target),
           "dev", INTERFACE, check=False)  # fmt: skip


def _deafen(interface: str) -> None:
    """The kernel carries nothing there and answers nobody (ip-sysctl: arp_ignore 8); in a bridge it
    does not anyway. Raises PlatformFaultError."""
    try:
        Path(f"/proc/sys/net/ipv4/conf/{interface}/arp_ignore").write_text("8")
        ipv6 = Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")
        if ipv6.exists():
            ipv6.write_text("1")
    except OSError as error:
        raise PlatformFaultError(f"cannot keep the kernel off {interface}: {error}") from error


def _free_subnet(start: int) -> str:
    """`10.87.N`, not routed anywhere yet."""
    taken = ip("-4", "route", "show", "table", "all", check=False)
    for step in range(len(SUBNETS)):
        subnet = f"10.87.{SUBNETS[(start + step) % len(SUBNETS)]}"
        if f"{subnet}." not in taken:
            return subnet
    raise PlatformFaultError("no subnet of 10.87.0.0/16 is free; run `outrider-chaos clean`")


def remove(prefix: str) -> list[str]:
    """Removes namespaces and links whose names start with `prefix`; what it removed."""
    removed = []
    for row in _rows("netns", "list"):
        if row["name"].startswith(f"{prefix}-"):
            ip("netns", "del", row["name"], check=False)
            removed.append(f"network namespace {row['name']}")
    for row in _rows("link", "show"):
        if row["ifname"].startswith(prefix):
            ip("link", "del", row["ifname"], check=False)
            removed.append(f"link {row['ifname']}")
    return removed


def sweep() -> list[str]:
    """Removes what runs left whose process is gone; what it removed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return []
    names = [row["name"] for row in _rows("netns", "list")]
    names += [row["ifname"] for row in _rows("link", "show")]
    owners = {found[1] for found in map(_NAME.match, names) if found}
    dead = [pid for pid in sorted(owners) if not Path(f"/proc/{pid}").exists()]
    return [line for pid in dead for line in remove(_prefix(pid))]


class NamespacedBroker(EmbeddedBroker):
    """The embedded broker in a namespace of the network, reached at its address there."""

    def __init__(self, directory: Path, network: Network) -> None:
        self._network = network
        super().__init__(directory)

    @property
    def bootstrap(self) -> str:
        """`10.87.N.2:PORT`."""
        return ",".join(f"{self._network.address(BROKER)}:{port}" for port in self._ports)

    def _argv(self, index: int) -> list[str]:
        local = super()._argv(index)
        here = f"tcp://{self.bootstrap}"
        argv = [here if word.startswith("tcp://") else word for word in local]
        return [*self._network.enter(BROKER), *argv]


def both_ways(
    inside: Iterable[str], outside: Iterable[str], direction: str
) -> list[tuple[str, str]]:
    """(source, target) pairs to cut, so that `inside` is cut off: both ways, or what it sends
    (`out`) or receives (`in`) only."""
    outside = list(outside)
    pairs = [(a, b) for a in inside for b in outside]
    cuts = [] if direction == "in" else list(pairs)
    return cuts if direction == "out" else cuts + [(b, a) for a, b in pairs]
