# ruff: noqa: PTH123
# pathlib would add a third to the launcher's memory.
"""What a job used, read from its cgroup files when it has ended.

v2 counts more than v1: pressure (PSI) and memory events exist there alone. What this kernel does
not count is left out, never reported as 0.
"""

from __future__ import annotations

import os

from node_agent.launcher.files import keyed_value, read_at

_RESOURCES = ("cpu", "memory", "io")
_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
# proc_pid_stat(5): utime, stime, cutime, cstime, counted from the field after the name.
_CPU_FIELDS = slice(11, 15)
_EVENTS = ("low", "high", "max", "oom", "oom_kill")


def of_v2(fd: int, holds: frozenset[str]) -> dict[str, object]:
    """Fields of the outcome from a v2 directory. CPU time and pressure need no controller."""
    used: dict[str, object] = {}
    cpu = read_at(fd, "cpu.stat")
    if cpu:
        used["cpu_us"] = keyed_value(cpu, "usage_usec")
        used["cpu_user_ms"] = keyed_value(cpu, "user_usec") // 1000
        used["cpu_system_ms"] = keyed_value(cpu, "system_usec") // 1000
        if "cpu" in holds:
            used["throttled_ms"] = keyed_value(cpu, "throttled_usec") // 1000
    if "memory" in holds:
        used |= _number("memory_peak_bytes", read_at(fd, "memory.peak"))
        events = read_at(fd, "memory.events")
        used["memory_events"] = {name: keyed_value(events, name) for name in _EVENTS}
    if "pids" in holds:
        used |= _number("pids_peak", read_at(fd, "pids.peak"))
    if "io" in holds:
        used |= io_bytes(read_at(fd, "io.stat"))
    return used | pressure(fd)


def of_v1(fds: dict[str, int]) -> dict[str, object]:
    """Fields of the outcome from v1 directories, by controller."""
    used: dict[str, object] = {}
    if "cpuacct" in fds:
        fd = fds["cpuacct"]
        used["cpu_us"] = int(read_at(fd, "cpuacct.usage") or 0) // 1000
        for name, file in (("user", "cpuacct.usage_user"), ("system", "cpuacct.usage_sys")):
            text = read_at(fd, file)
            if text:
                used[f"cpu_{name}_ms"] = int(text) // 1_000_000
    if "cpu" in fds:
        used["throttled_ms"] = keyed_value(read_at(fds["cpu"], "cpu.stat"), "throttled_time") // (
            1_000_000
        )
    if "memory" in fds:
        used |= _number("memory_peak_bytes", read_at(fds["memory"], "memory.max_usage_in_bytes"))
    if "pids" in fds:
        used |= _number("pids_peak", read_at(fds["pids"], "pids.peak"))
    if "blkio" in fds:
        used |= io_bytes_v1(read_at(fds["blkio"], "blkio.throttle.io_service_bytes"))
    return used


def _number(name: str, text: str) -> dict[str, object]:
    return {name: int(text)} if text else {}


def io_bytes(stat: str) -> dict[str, object]:
    """The sums over all devices of ``io.stat`` (lines ``major:minor rbytes=… wbytes=…``)."""
    sums = {"rbytes": 0, "wbytes": 0}
    for word in stat.split():
        name, _, value = word.partition("=")
        if name in sums:
            sums[name] += int(value)
    return {"io_read_bytes": sums["rbytes"], "io_write_bytes": sums["wbytes"]}


def io_bytes_v1(stat: str) -> dict[str, object]:
    """The same from ``blkio.throttle.io_service_bytes`` (lines ``major:minor Read 4096``)."""
    sums = {"Read": 0, "Write": 0}
    for line in stat.splitlines():
        words = line.split()
        if len(words) == len(("device", "kind", "bytes")) and words[1] in sums:
            sums[words[1]] += int(words[2])
    return {"io_read_bytes": sums["Read"], "io_write_bytes": sums["Write"]}


def pressure(fd: int) -> dict[str, object]:
    """PSI ``some total`` of each resource in µs; nothing where this kernel has none of them."""
    found = {}
    for resource in _RESOURCES:
        try:
            text = read_at(fd, f"{resource}.pressure")
        except OSError:
            continue  # EOPNOTSUPP: built in, and switched off at boot (psi=0)
        total = text.partition("total=")[2].partition("\n")[0]
        if total:
            found[f"{resource}_us"] = int(total)
    return {"pressure": found} if found else {}


def of_tree(init_pid: int) -> int:
    """CPU time of a job's processes without any cgroup, in µs: what is alive and what was waited
    for below init. Children that nobody waits for are missed, so a job can hide some."""
    total, left = 0, [init_pid]
    while left:
        pid = left.pop()
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
                left += [int(child) for child in file.read().split()]
        except OSError:
            continue  # it ended meanwhile, or this kernel does not list children
        total += sum(int(ticks) for ticks in fields[_CPU_FIELDS])
    return total * _TICK_US
