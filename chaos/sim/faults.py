"""What goes wrong, planned from the seed: each fault has a number, a time and dice of its own.

The plan is a list, so that a failing seed can be made small by leaving faults out (`shrink`).
Whom a fault hits is chosen when it happens, from its own dice: who leads is not known before.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from chaos.sim.cluster import Cluster
from controlplane.core import events as e

FIRST_MS: Final = 400
FAULTS_MIN: Final = 3
FAULTS_MAX: Final = 14
WEATHER: Final = (0.05, 0.2, 0.5)
JUMPS_MS: Final = (-90_000, -5_000, -300, 300, 5_000, 90_000)
"""Within FRESH_MS and beyond: beyond, envelopes are refused until the clock is mended."""
_LASTS_MS: Final = (60, 2_500)
_LONG_MS: Final = (500, 6_000)


class Fault(msgspec.Struct, frozen=True):
    """One fault of the plan. `kind` is a key of FAULTS."""

    number: int
    at_ms: int
    kind: str
    lasts_ms: int


Act = Callable[[Cluster, random.Random, int], str]
"""Does it to the cluster, plans its healing, says whom it hit."""


def plan(seed: int, until_ms: int) -> tuple[Fault, ...]:
    """The faults of a seed, in order of time."""
    dice = random.Random(f"outrider/{seed}/faults")
    kinds = list(FAULTS)
    found = []
    for number in range(dice.randint(FAULTS_MIN, FAULTS_MAX)):
        kind = dice.choice(kinds)
        low, high = _LONG_MS if kind in _LONG else _LASTS_MS
        found.append(Fault(number, dice.randint(FIRST_MS, until_ms), kind, dice.randint(low, high)))
    return tuple(sorted(found, key=lambda fault: (fault.at_ms, fault.number)))


def strike(cluster: Cluster, fault: Fault) -> None:
    """The fault happens."""
    dice = random.Random(f"outrider/{cluster.seed}/fault/{fault.number}")
    who = FAULTS[fault.kind](cluster, dice, fault.lasts_ms)
    cluster.world.count("fault", fault.kind)
    cluster.world.note(f"FAULT {fault.number} {fault.kind} {who} for {fault.lasts_ms} ms", "fault")


def _victim(cluster: Cluster, dice: random.Random) -> str:
    """The leader more often than not."""
    leader = cluster.leader
    if leader is not None and dice.random() < 0.6:
        return leader.name
    return dice.choice(list(cluster.processes))


def _node(cluster: Cluster, dice: random.Random) -> str:
    return dice.choice(cluster.node_names)


# --- coordinators -------------------------------------------------------------------------------


def _crash(hint: bool, cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    name = _victim(cluster, dice)
    process = cluster.processes[name]
    process.die()
    if hint:
        cluster.tell_gone(name)

    def restart() -> None:
        if cluster.processes[name] is process:
            cluster.start_coordinator(name)

    cluster.world.after(lasts_ms, restart)
    return name


def _pause(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    process = cluster.processes[_victim(cluster, dice)]
    process.hung = True
    cluster.world.after(lasts_ms, process.wake)
    return process.name


def _faint(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """The leader hangs between deciding and reading back: others carry out what it decided, and
    when it wakes it may do so as well."""
    leader = cluster.leader
    if leader is None:
        return "nobody"
    leader.faints_ms = lasts_ms
    return leader.name


def _slow_reader(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    process = cluster.processes[_victim(cluster, dice)]
    process.deaf_to_kafka = True
    cluster.world.after(lasts_ms, lambda: setattr(process, "deaf_to_kafka", False))
    return process.name


def _false_hint(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    name = _victim(cluster, dice)
    cluster.tell_gone(name)
    return name


def _usurp(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """An election gone mad: several take the role at once, and of one term."""
    hit = []
    for process in cluster.processes.values():
        if process.alive and dice.random() < 0.7:
            won = e.RoleWon(term=process.core.state.term + 1, why="usurped")
            late = partial(process.guard, partial(process.decide, won))
            cluster.world.after(dice.randint(0, 3), late)
            hit.append(process.name)
    return ",".join(hit)


# --- network ------------------------------------------------------------------------------------


def _cut(cluster: Cluster, links: list[tuple[str, str]], lasts_ms: int) -> None:
    cut = cluster.network.cut(links)
    cluster.world.after(lasts_ms, partial(cluster.network.mend, cut))


def _partition(one_way: bool, cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """One coordinator from all the others, or half of the nodes from it as well."""
    name = _victim(cluster, dice)
    others = [other for other in cluster.processes if other != name]
    others += [node for node in cluster.node_names if dice.random() < 0.5]
    links = [(name, other) for other in others]
    if one_way and dice.random() < 0.5:
        links = [(other, name) for other in others]
    elif not one_way:
        links += [(other, name) for other in others]
    _cut(cluster, links, lasts_ms)
    return f"{name}|{','.join(others)}"


def _node_cut(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """The node goes on and reaches nobody, nor Kafka: a zombie once it is declared lost."""
    node = cluster.nodes[_node(cluster, dice)]
    names = list(cluster.processes)
    _cut(cluster, [(node.name, n) for n in names] + [(n, node.name) for n in names], lasts_ms)
    node.cut_off = True
    cluster.world.after(lasts_ms, lambda: setattr(node, "cut_off", False))
    return node.name


def _node_mute(deaf: bool, cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    name = _node(cluster, dice)
    names = list(cluster.processes)
    _cut(cluster, [(n, name) if deaf else (name, n) for n in names], lasts_ms)
    return name


def _rate(part: str, attribute: str, cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """Weather: a chance of the network or of Kafka is up for a while."""
    target, chance = getattr(cluster, part), dice.choice(WEATHER)
    setattr(target, attribute, chance)
    cluster.world.after(lasts_ms, lambda: setattr(target, attribute, 0.0))
    return f"{chance:.2f}"


def _kafka_down(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    cluster.kafka.available = False
    cluster.world.after(lasts_ms, lambda: setattr(cluster.kafka, "available", True))
    return "kafka"


def _kafka_cut(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """One coordinator does not reach Kafka; all others do."""
    name = _victim(cluster, dice)
    cluster.cut_off.add(name)
    cluster.world.after(lasts_ms, lambda: cluster.cut_off.discard(name))
    return name


# --- clocks -------------------------------------------------------------------------------------


def _clock_jump(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    name, jump = dice.choice(list(cluster.walls)), dice.choice(JUMPS_MS)
    wall = cluster.walls[name]
    number = dice.getrandbits(32)
    wall.jumps[number] = jump

    def mend() -> None:
        wall.jumps.pop(number, None)

    cluster.world.after(lasts_ms, mend)
    return f"{name} {jump:+d} ms"


# --- nodes --------------------------------------------------------------------------------------


def _node_crash(how: str, cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    node = cluster.nodes[_node(cluster, dice)]
    if not node.agent.alive:
        return f"{node.name} (down already)"
    node.crash(keep=how != "reboot", launcher_dies=how == "launcher")
    dead = node.agent

    def restart() -> None:
        if node.agent is dead:
            node.start(keep=how != "reboot")

    if how != "gone":
        cluster.world.after(lasts_ms, restart)
    return node.name


def _node_gone(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    """For good; the last one of the row, so that jobs can still end."""
    node = cluster.nodes[cluster.node_names[-1]]
    if node.agent.alive:
        node.crash(keep=False)
    return node.name


def _node_pause(cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    agent = cluster.nodes[_node(cluster, dice)].agent
    agent.hung = True
    cluster.world.after(lasts_ms, agent.wake)
    return agent.name


def _disk(attribute: str, cluster: Cluster, dice: random.Random, lasts_ms: int) -> str:
    node = cluster.nodes[_node(cluster, dice)]
    setattr(node, attribute, True)
    cluster.world.after(lasts_ms, lambda: setattr(node, attribute, False))
    return node.name


FAULTS: Final[dict[str, Act]] = {
    "crash": partial(_crash, True),
    "crash_unnoticed": partial(_crash, False),
    "pause": _pause,
    "faint": _faint,
    "slow_reader": _slow_reader,
    "false_hint": _false_hint,
    "usurp": _usurp,
    "partition": partial(_partition, False),
    "partition_one_way": partial(_partition, True),
    "loss": partial(_rate, "network", "loss"),
    "duplication": partial(_rate, "network", "duplicates"),
    "delay": partial(_rate, "network", "slow"),
    "reordering": partial(_rate, "network", "reorder"),
    "log_unavailable": _kafka_down,
    "log_cut": _kafka_cut,
    "log_slow": partial(_rate, "kafka", "slow"),
    "log_fails": partial(_rate, "kafka", "fails"),
    "log_late": partial(_rate, "kafka", "late"),
    "log_twice": partial(_rate, "kafka", "twice"),
    "clock_jump": _clock_jump,
    "node_reboot": partial(_node_crash, "reboot"),
    "agent_restart": partial(_node_crash, "agent"),
    "agent_and_launcher_restart": partial(_node_crash, "launcher"),
    "node_gone": _node_gone,
    "node_pause": _node_pause,
    "node_cut": _node_cut,
    "node_mute": partial(_node_mute, False),
    "node_deaf": partial(_node_mute, True),
    "disk_full": partial(_disk, "disk_full"),
    "disk_slow": partial(_disk, "disk_slow"),
}
"""Every kind of fault; the coverage table lists them all."""
_LONG: Final = frozenset({
    "loss", "duplication", "delay", "reordering", "log_slow", "log_fails", "log_late", "log_twice",
    "node_cut", "node_mute", "node_deaf", "clock_jump", "disk_full", "disk_slow", "log_cut",
    "faint",
})  # fmt: skip


def heal(cluster: Cluster) -> None:
    """Faults cease: everything runs, and every clock and link is right. A node that is gone for
    good stays away."""
    cluster.network.calm()
    cluster.kafka.calm()
    cluster.cut_off.clear()
    for wall in cluster.walls.values():
        wall.skew_ms = 0
        wall.jumps.clear()
    for name in list(cluster.processes):
        process = cluster.processes[name]
        process.deaf_to_kafka, process.faints_ms = False, 0
        if not process.alive:
            cluster.start_coordinator(name)
        elif process.hung:
            process.wake()
    for node in cluster.nodes.values():
        node.disk_full = node.disk_slow = node.cut_off = False
        if node.agent.alive and node.agent.hung:
            node.agent.wake()
