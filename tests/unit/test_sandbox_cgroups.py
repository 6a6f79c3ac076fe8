"""Control groups against folders that look like cgroup v2: layout, files written, sweeping.

A plain folder behaves like a cgroup as far as paths go; what the kernel does with the values is the
integration tests' matter.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from node_agent.launcher import cgroups, limits, usage
from node_agent.launcher.cgroups import Mounted, find_hierarchies, own_directory
from node_agent.launcher.files import keyed_value, read_table
from node_agent.launcher.limits import Limits
from node_agent.oci import cgroups as confined

_HYBRID_MOUNTS = """\
22 1 0:20 / /proc rw - proc proc rw
30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio
35 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
36 1 0:28 / /elsewhere rw - cgroup cgroup rw,memory
"""
_HYBRID_OWN = "9:pids:/\n4:memory:/agent/x\n2:cpu,cpuacct:/\n1:blkio:/\n0::/user.slice\n"


def test_hybrid_hierarchies_are_found_once_each() -> None:
    found = find_hierarchies(_HYBRID_MOUNTS, _HYBRID_OWN)
    assert {(mounted.controllers, mounted.directory) for mounted in found} == {
        (frozenset({"cpu", "cpuacct"}), "/sys/fs/cgroup/cpu,cpuacct"),
        (frozenset({"memory"}), "/sys/fs/cgroup/memory/agent/x"),
        (frozenset({"pids"}), "/sys/fs/cgroup/pids"),
        (frozenset({"blkio"}), "/sys/fs/cgroup/blkio"),
        (frozenset(), "/sys/fs/cgroup/unified/user.slice"),
    }


def test_v2_after_moving_into_the_leaf_uses_the_parent() -> None:
    mounts = "35 30 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    own = f"0::/system.slice/agent.service/{cgroups.SELF_LEAF}\n"
    (found,) = find_hierarchies(mounts, own)
    assert found.directory == "/sys/fs/cgroup/system.slice/agent.service"
    (forced,) = find_hierarchies(mounts, own, "/outrider.slice")
    assert forced.directory == "/sys/fs/cgroup/outrider.slice"


@pytest.mark.parametrize(
    ("mount_root", "own", "expected"),
    [
        ("/", "/", "/cg"),
        ("/", "/a/b", "/cg/a/b"),
        ("/docker/id", "/docker/id", "/cg"),
        ("/docker/id", "/docker/id/sub", "/cg/sub"),
        ("/", "/../../x", "/cg"),
    ],
)
def test_own_directory_below_a_mount(mount_root: str, own: str, expected: str) -> None:
    assert own_directory(mount_root, "/cg", own) == expected


def test_keyed_value() -> None:
    assert keyed_value("low 0\noom 3\noom_kill 2\n", "oom_kill") == 2
    assert keyed_value("", "oom_kill") == 0


ODD = b"a\rb\x0cc\x1cd\xc2\x85e\xe2\x80\xa8f\xff\xe9"


def odd_tables(folder: Path) -> tuple[str, str]:
    """Mounts and own cgroups as the kernel writes them where somebody chose such names."""
    line = b"36 1 0:99 / /mnt/" + ODD + b" rw - fuse." + ODD + b" /dev/" + ODD + b" rw\n"
    group = b"35 30 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    (folder / "mountinfo").write_bytes(line + group + line)
    (folder / "cgroup").write_bytes(b"0::/" + ODD + b"\n")
    return read_table(f"{folder}/mountinfo"), read_table(f"{folder}/cgroup")


def test_names_that_others_chose_are_bytes_in_one_line(tmp_path: Path) -> None:
    """Any user may mount a FUSE: one such name kept every launcher of the host from starting."""
    mounts, own = odd_tables(tmp_path)
    (found,) = find_hierarchies(mounts, own)
    assert os.fsencode(found.directory) == b"/sys/fs/cgroup/" + ODD
    ours = confined.own_directories(mounts, own, "")
    assert ours == {"/sys/fs/cgroup": found.directory}


def test_a_file_system_of_an_odd_kind_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no UTF-8 has no place in a message to the agent."""
    mounts, _ = odd_tables(tmp_path)
    point = os.fsdecode(b"/mnt/" + ODD)
    nothing = os.stat_result((0,) * 10)
    monkeypatch.setattr(os, "stat", lambda _path: nothing)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    disks, (unknown,) = limits.disks_behind([point], mounts)
    assert disks == []
    kind = unknown.removeprefix(f"{point} (")
    assert kind.startswith("fuse.a") and kind.isascii() and kind.isprintable()


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    return folder(
        tmp_path / "cg",
        cgroup__controllers="cpuset cpu io memory pids\n",
        cgroup__subtree_control="cpu cpuset io memory pids\n",
        cgroup__procs="",
    )


def job_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdir in a real cgroup makes the interface files; here we do."""
    names = (
        "memory.max memory.swap.max memory.oom.group pids.max cpu.max cgroup.subtree_control "
        "cpuset.cpus cpuset.mems io.max"
    )
    real: Callable[..., None] = os.mkdir

    def mkdir(name: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(name, mode, dir_fd=dir_fd)
        made = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
        for file in names.split():
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=made))
        os.close(made)

    monkeypatch.setattr(os, "mkdir", mkdir)


def test_v2_limits_are_written_where_v2_holds_them(
    v2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_files(monkeypatch)
    tree = cgroups.open_tree("outrider-a.1", [Mounted(frozenset(), str(v2))], frozenset())
    assert (tree.kind, tree.problems) == ("v2", {})
    assert tree.holds == {"cpu", "cpuset", "io", "memory", "pids", "cpu_time"}
    enabled = (v2 / "outrider-a.1/cgroup.subtree_control").read_text()
    assert enabled == "+cpu +cpuset +io +memory +pids"
    job = tree.make("j1-x")
    job.limit(Limits(1 << 26, 17), ["8:0"])
    home = v2 / "outrider-a.1/j1-x"
    assert (home / "cpu.max").read_text() == "", "the quota begins with the job's command"
    job.limit_cpu(1500)
    assert (home / "memory.max").read_text() == str(1 << 26)
    assert (home / "memory.swap.max").read_text() == "0"
    assert (home / "memory.oom.group").read_text() == "1"
    assert (home / "pids.max").read_text() == "17"
    assert (home / "cpu.max").read_text() == "150000 100000"
    assert job.join_fds() == [] and job.into_fd is not None
    assert not (home / "cpuset.cpus").read_text() and not (home / "io.max").read_text()


def test_v2_swap_io_and_cpuset(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_files(monkeypatch)
    tree = cgroups.open_tree("outrider-a.1", [Mounted(frozenset(), str(v2))], frozenset())
    wanted = Limits(1 << 26, 17, swap_bytes=7, io=(1000, 0), cpus=(0, 2, 3), mems=(1,))
    tree.make("j1-x", wanted.on_demand).limit(wanted, ["8:0"])
    home = v2 / "outrider-a.1/j1-x"
    assert (home / "memory.swap.max").read_text() == "7"
    assert (home / "cpuset.cpus").read_text() == "0,2,3"
    assert (home / "cpuset.mems").read_text() == "1"
    assert (home / "io.max").read_text() == "8:0 rbps=1000 wbps=max"


def test_a_disk_that_cannot_be_throttled_is_found_at_the_start(
    v2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_files(monkeypatch)
    tree = cgroups.open_tree("outrider-a.1", [Mounted(frozenset(), str(v2))], frozenset())
    tree.disks = ["8:0"]
    tree.try_throttle()
    assert (v2 / "outrider-a.1/io.max").read_text() == "8:0 rbps=max wbps=max"
    (v2 / "outrider-a.1/io.max").unlink()
    with pytest.raises(OSError, match=r"io\.max"):
        tree.try_throttle()


def test_v2_usage_is_what_the_files_say(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_files(monkeypatch)
    tree = cgroups.open_tree("outrider-a.1", [Mounted(frozenset(), str(v2))], frozenset())
    job = tree.make("j1-x")
    folder(
        v2 / "outrider-a.1/j1-x",
        memory__events="low 0\nhigh 4\nmax 2\noom 1\noom_kill 1\n",
        memory__peak="4096\n",
        cpu__stat="usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n"
        "nr_throttled 3\nthrottled_usec 70000\n",
        io__stat="8:0 rbytes=100 wbytes=20 rios=1\n8:16 rbytes=5 wbytes=0 rios=1\n",
        cpu__pressure="some avg10=0.00 total=11\nfull avg10=0.00 total=9\n",
        memory__pressure="some avg10=0.00 total=12\nfull avg10=0.00 total=9\n",
        io__pressure="some avg10=0.00 total=13\nfull avg10=0.00 total=9\n",
    )
    assert (job.oom_kills(), job.cpu_us()) == (1, 2_500_000)
    assert job.used() == {
        "cpu_us": 2_500_000,
        "cpu_user_ms": 2000,
        "cpu_system_ms": 500,
        "throttled_ms": 70,
        "memory_peak_bytes": 4096,
        "memory_events": {"low": 0, "high": 4, "max": 2, "oom": 1, "oom_kill": 1},
        "io_read_bytes": 105,
        "io_write_bytes": 20,
        "pressure": {"cpu_us": 11, "memory_us": 12, "io_us": 13},
    }


def test_v1_files_and_on_demand_hierarchies() -> None:
    plain = Limits(1 << 20, 5)
    assert plain.on_demand == frozenset()
    wanted = Limits(1 << 20, 5, swap_bytes=1 << 20, io=(1000, 2000), cpus=(1,))
    assert wanted.on_demand == {"blkio", "cpuset"}
    files = limits.v1_files(wanted, ["8:0", "8:16"])
    assert files["memory"][1] == ("memory.memsw.limit_in_bytes?", str(2 << 20))
    assert files["blkio"] == [
        ("blkio.throttle.read_bps_device", "8:0 1000"),
        ("blkio.throttle.read_bps_device", "8:16 1000"),
        ("blkio.throttle.write_bps_device", "8:0 2000"),
        ("blkio.throttle.write_bps_device", "8:16 2000"),
    ]
    assert files["cpuset"] == [("cpuset.cpus", "1")]


def test_v1_io_is_counted_over_disks_without_the_totals() -> None:
    stat = "8:0 Read 4096\n8:0 Write 10\n8:0 Total 4106\n8:16 Read 4\nTotal 4110\n"
    assert usage.io_bytes_v1(stat) == {"io_read_bytes": 4100, "io_write_bytes": 10}


def test_what_lies_in_memory_has_no_disk_and_an_overlay_is_named() -> None:
    mounts = "1 0 0:20 / / rw - overlay overlay rw\n2 1 0:21 / /proc rw - proc proc rw\n"
    disks, unknown = limits.disks_behind(["/usr", "/proc/self", "/no/such/path"], mounts)
    if os.major(Path("/usr").stat().st_dev):  # a disk of this machine's own
        assert len(disks) == 1 and unknown == []
    else:
        assert (disks, unknown) == ([], ["/usr (overlay)"])


def test_a_v2_group_that_holds_strangers_is_not_used(v2: Path) -> None:
    """The kernel answers EBUSY; processes that are not ours are never moved."""
    (v2 / "cgroup.subtree_control").unlink()  # reads as empty; writing it fails
    (v2 / "cgroup.procs").write_text("1\n")
    tree = cgroups.open_tree("outrider-a.1", [Mounted(frozenset(), str(v2))], frozenset({2}))
    assert tree.kind == "none" and tree.holds == frozenset()
    assert list(tree.problems.values()) == [["v2"]]


def test_a_missing_hierarchy_is_reported(tmp_path: Path) -> None:
    gone = Mounted(frozenset({"memory"}), str(tmp_path / "gone"))
    tree = cgroups.open_tree("outrider-a.1", [gone], frozenset())
    assert tree.problems == {"No such file or directory": ["memory"]}


def test_only_dead_launchers_of_ours_are_swept(tmp_path: Path) -> None:
    base = folder(tmp_path / "cg")
    folder(base / "outrider-dead.1/j1-a")
    folder(base / "outrider-dead.1/j2-b")
    folder(base / "outrider-live.2/j1-a")
    folder(base / "someone-else/x")
    folder(base / cgroups.SELF_LEAF)
    live = os.open(base / "outrider-live.2", os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    fd = os.open(base, os.O_RDONLY)
    try:
        assert cgroups.sweep(fd) == ["outrider-dead.1"]
    finally:
        os.close(fd)
        os.close(live)
    left = {path.name for path in base.iterdir()}
    assert left == {"outrider-live.2", "someone-else", cgroups.SELF_LEAF}


def test_what_another_user_s_launcher_left_is_neither_locked_nor_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We cannot remove it, and while we tried, five seconds for each, its user could not."""
    base = os.open(folder(tmp_path / "cg/outrider-dead.1").parent, os.O_RDONLY)
    locked: list[str] = []
    real = cgroups.lock_directory

    def lock(base_fd: int, name: str) -> int:
        locked.append(name)
        return real(base_fd, name)

    monkeypatch.setattr(cgroups, "lock_directory", lock)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cgroups.sweep(base) == [] and locked == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cgroups.sweep(base) == locked == ["outrider-dead.1"]
    os.close(base)


def once(
    monkeypatch: pytest.MonkeyPatch, module: object, call: str, then: Callable[[], None]
) -> None:
    """After the first `call` from now on, `then` happens: another launcher, at that moment."""
    real = getattr(module, call)

    def patched(*args: object, **fields: object) -> object:
        monkeypatch.setattr(module, call, real)
        result = real(*args, **fields)
        then()
        return result

    monkeypatch.setattr(module, call, patched)


@pytest.mark.parametrize("moment", ["mkdir", "open"])
def test_a_directory_swept_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Two launchers start at once: one sweeps while the other has made its own, or opened it."""
    base = os.open(folder(tmp_path / "cg"), os.O_RDONLY)
    swept: list[str] = []
    once(monkeypatch, os, moment, lambda: swept.extend(cgroups.sweep(base)))
    lock = cgroups.make_locked(base, "outrider-new.1")
    assert swept == ["outrider-new.1"]
    assert cgroups.sweep(base) == [] and (tmp_path / "cg/outrider-new.1").is_dir()
    assert os.path.samestat(os.fstat(lock), os.stat("outrider-new.1", dir_fd=base))
    os.close(lock)
    os.close(base)


def test_one_made_again_is_not_swept_in_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sweeps has opened a dead one, which another sweeps first; the name is in use again."""
    base = os.open(folder(tmp_path / "cg/outrider-a.1").parent, os.O_RDONLY)
    locks: list[int] = []

    def replaced() -> None:
        (tmp_path / "cg/outrider-a.1").rmdir()
        locks.append(cgroups.make_locked(base, "outrider-a.1"))

    once(monkeypatch, os, "open", replaced)
    assert cgroups.sweep(base) == [] and (tmp_path / "cg/outrider-a.1").is_dir()
    os.close(locks[0])
    os.close(base)


def test_one_that_is_swept_right_now_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "cg/outrider-a.1")
    base = os.open(path.parent, os.O_RDONLY)
    sweeping = cgroups.lock_directory(base, "outrider-a.1")

    def removed(_s: float) -> None:
        if path.exists():
            path.rmdir()
            os.close(sweeping)

    monkeypatch.setattr(time, "sleep", removed)
    os.close(cgroups.make_locked(base, "outrider-a.1"))
    os.close(base)
