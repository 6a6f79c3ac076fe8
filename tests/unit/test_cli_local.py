"""The local cluster's parts that need no cluster: shares, ports, records, processes, lookup."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from dataplane.broker.processes import identify
from idl.errors import ConfigError
from idl.settings import ClusterSettings
from idl.units import GIB, MIB
from outrider.client.config import find_cluster, find_config
from outrider.local.cluster import LocalCluster, LocalOptions
from outrider.local.machine import (
    coordinator_dds_port,
    free_dds_domain,
    free_tcp_ports,
    host_cpus,
    host_memory_bytes,
    share_of_host,
)
from outrider.local.process import (
    MARK_VARIABLE,
    Identity,
    find_marked,
    identity_of,
    is_alive,
    log_tail,
    send_signal,
    spawn,
    stop_all,
    wait_gone,
)
from outrider.local.readiness import NotReadyError, wait_ready
from outrider.local.record import (
    LOCK_MARK,
    Layout,
    ProcessRecord,
    RunRecord,
    layout,
    write_atomically,
    write_chosen,
)

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('deaf', flush=True); time.sleep(60)",
)


def test_the_machine_is_divided_evenly_and_something_is_left_for_the_control_plane() -> None:
    share = share_of_host(2, cpus=2, memory_bytes=8 * GIB)
    assert (share.cpu_millis, share.memory_bytes) == (1000, 3584 * MIB)
    assert str(share) == "1 CPU, 3.5Gi memory"
    tiny = share_of_host(3, cpus=1, memory_bytes=GIB)
    assert (tiny.cpu_millis, tiny.memory_bytes) == (330, 256 * MIB)


def test_more_than_there_is_needs_to_be_said() -> None:
    with pytest.raises(ConfigError, match="--overcommit"):
        share_of_host(2, cpus=2, memory_bytes=GIB, cpu_millis=1500)
    with pytest.raises(ConfigError, match="--overcommit"):
        share_of_host(2, cpus=2, memory_bytes=GIB, node_memory_bytes=GIB)
    share = share_of_host(2, cpus=2, memory_bytes=GIB, cpu_millis=1500, overcommit=True)
    assert share.cpu_millis == 1500


def test_a_container_quota_counts_as_cpus(tmp_path: Path) -> None:
    every = host_cpus(tmp_path)
    assert every == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert host_cpus(tmp_path) == 0.5
    assert share_of_host(2, cpus=0.5, memory_bytes=GIB).cpu_millis == 250
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host_cpus(tmp_path) == every
    (tmp_path / "cpu").mkdir()
    for name, text in (("quota", "20000"), ("period", "100000")):
        (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(f"{text}\n")
    assert host_cpus(tmp_path) == 0.2
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert host_cpus(tmp_path) == every


def test_a_container_limit_counts_as_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{64 * MIB}\n")
    assert host_memory_bytes(tmp_path) == 64 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory_bytes(tmp_path) > 64 * MIB


def test_ports_and_domains_are_different_and_in_range() -> None:
    assert len(set(free_tcp_ports(20))) == 20
    assert coordinator_dds_port(3, 2) == 7410 + 750 + 4
    assert 0 <= free_dds_domain(5, start=7) <= 200


NAMELESS = (
    sys.executable,
    "-c",
    r"import ctypes, time; ctypes.CDLL(None).prctl(15, b'\xff) \xfe', 0, 0, 0);"
    "print('renamed', flush=True); time.sleep(60)",
)


def test_a_process_may_call_itself_anything(tmp_path: Path) -> None:
    """PR_SET_NAME takes any bytes, and a hostile job's processes are looked at, too."""
    log = tmp_path / "log"
    child = spawn(NAMELESS, log, f"{tmp_path}:odd", {})
    deadline = time.monotonic() + 30
    while "renamed" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b"\xff" in Path(f"/proc/{child.pid}/stat").read_bytes()
    (found,) = find_marked(f"{tmp_path}:odd")
    broker_process = identify(child.pid)
    assert broker_process is not None and broker_process.started_ticks == found.start_ticks
    assert stop_all([found]) == []
    assert identity_of(child.pid) is None


def test_a_process_is_recognised_signalled_and_stopped(tmp_path: Path) -> None:
    child = spawn(SLEEP, tmp_path / "log", f"{tmp_path}:one", {})
    identity = identity_of(child.pid)
    assert identity is not None
    assert is_alive(identity)
    for _ in range(200):  # an exec that is not through yet shows no environment (proc(5))
        if marked := [found.pid for found in find_marked(f"{tmp_path}:")]:
            break
        time.sleep(0.05)
    assert marked == [child.pid]
    stranger = Identity(pid=child.pid, start_ticks=identity.start_ticks - 1)
    assert not is_alive(stranger)
    assert not send_signal(stranger, signal.SIGKILL)
    assert wait_gone(stranger, 0)
    assert not wait_gone(identity, 0)
    send_signal(identity, signal.SIGSTOP)
    assert stop_all([identity], grace_s=30) == []
    assert child.wait(30) == -signal.SIGTERM
    assert not is_alive(identity)


def test_a_process_deaf_to_sigterm_is_killed_and_named(tmp_path: Path) -> None:
    child = subprocess.Popen(STUBBORN, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.readline() == b"deaf\n"
    identity = identity_of(child.pid)
    assert identity is not None
    assert stop_all([identity], grace_s=0.05) == [identity]
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()


def test_our_packages_are_importable_in_what_is_spawned(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"import os, idl; print(os.environ['{MARK_VARIABLE}'], os.environ['EXTRA'])"
    child = spawn((sys.executable, "-c", code), log, "mark:x", {"EXTRA": "yes"})
    assert child.wait(30) == 0
    assert log.read_text() == "mark:x yes\n"
    assert log_tail(log, 5) == "mark:x yes"
    assert "cannot read" in log_tail(tmp_path / "none")


def run_record(*processes: ProcessRecord) -> RunRecord:
    return RunRecord(name="local", phase="up", started_ms=1, kafka="k:1", processes=processes)


def test_the_run_record_survives_a_round_trip_and_refuses_damage(tmp_path: Path) -> None:
    place = Layout("local", tmp_path)
    assert place.read_run() is None
    one = ProcessRecord(name="c1", role="coordinator", arguments=("a",), log="l")
    run = run_record(one)
    place.write_run(run)
    assert place.read_run() == run
    changed = msgspec.structs.replace(one, identity=Identity(pid=1, start_ticks=2))
    assert run.having(changed).processes == (changed,)
    with pytest.raises(ConfigError, match=r"no process 'n9' .* \(there: c1\)"):
        run.process("n9")
    place.run_file.write_text("{")
    with pytest.raises(ConfigError, match="stop its processes by hand"):
        place.read_run()


def test_secrets_are_written_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_atomically(path, b"x", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="cannot write"):
        write_atomically(tmp_path / "none" / "file", b"x")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As root a device would be: `outrider result j --to /dev/null`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_chosen(pipe, b"result")
        assert os.read(reader, 100) == b"result"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for content in (b"new", b"replaced"):
        write_chosen(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    write_chosen(tmp_path / "plain", b"x")
    assert (tmp_path / "plain").read_bytes() == b"x"
    with pytest.raises(ConfigError, match="cannot write"):
        write_chosen(tmp_path, b"x")


def test_where_a_cluster_lives(tmp_path: Path) -> None:
    assert layout("a", env={"XDG_STATE_HOME": "/s"}).folder == Path("/s/outrider/a")
    assert layout("a", tmp_path).cluster_file == tmp_path / "cluster.json"
    assert layout("a", env={}).folder.name == "a"
    with pytest.raises(ConfigError, match="is not a name"):
        layout("../x")


def test_only_a_clusters_folder_is_removed(tmp_path: Path) -> None:
    """`down --dir X --purge` with a mistyped X."""
    home = tmp_path / "home"
    for name in ("thesis", "state", "logs", "logs.previous"):
        (home / name).mkdir(parents=True)
        (home / name / "work").write_text("years of it")
    (home / "cluster.json").write_text("{}")  # a cluster file that somebody wrote
    place = layout(folder=home)
    before = sorted(home.rglob("*"))
    with pytest.raises(ConfigError, match="not the folder of a local cluster: nothing was removed"):
        LocalCluster.purge(place)
    with pytest.raises(ConfigError, match="give a new or an empty folder"):
        LocalCluster.start(LocalOptions(folder=home))
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    "files",
    [
        {"lock": b"", "cluster.json": b"{}"},
        {"run.json": b"{}"},
        {"lock": LOCK_MARK, "logs": b"", "broker": b""},  # of an `up` that failed early
    ],
)
def test_a_clusters_folder_is_known_and_removed(files: dict[str, bytes], tmp_path: Path) -> None:
    place = layout(folder=tmp_path / "c")
    place.folder.mkdir()
    for name, content in files.items():
        (place.folder / name).write_bytes(content)
    place.check_free()
    LocalCluster.purge(place)
    assert not place.folder.exists()


def test_an_empty_folder_is_free_and_one_may_be_claimed(tmp_path: Path) -> None:
    place = layout(folder=tmp_path)
    layout(folder=tmp_path / "none").check_free()
    place.check_free()
    place.lock_file.touch()
    place.check_free()
    (tmp_path / "other").touch()
    with pytest.raises(ConfigError, match="new or an empty folder"):
        place.check_free()
    place.claim()
    place.check_free()


def test_a_folder_that_stays_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    place = layout(folder=tmp_path / "link")
    place.folder.symlink_to(folder)
    place.claim()
    with pytest.raises(ConfigError, match=r"cannot remove .*link.*; remove it by hand"):
        LocalCluster.purge(place)
    assert folder.exists()


def test_which_cluster_is_meant(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="no cluster is known"):
        find_config(env=env)
    for name in ("one", "two"):
        folder = tmp_path / "outrider" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        if name == "one":
            assert find_config(env=env) == folder / "cluster.json"
    with pytest.raises(ConfigError, match=r"several local clusters run \(one, two\)"):
        find_config(env=env)
    assert find_config(env=env | {"OUTRIDER_CONFIG": "/c.json"}) == Path("/c.json")
    assert find_config("/d.json", env | {"OUTRIDER_CONFIG": "/c.json"}) == Path("/d.json")
    settings = ClusterSettings(cluster="given")
    assert find_cluster(settings) is settings


def test_waiting_for_what_ended_says_so_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"level": "info"}\nn1: cluster file has no secret\n')
    record = ProcessRecord(name="n1", role="agent", arguments=(), log=str(log), metrics_port=1)
    with pytest.raises(NotReadyError, match=r"exit code 2 while starting \(n1: cluster file"):
        wait_ready([record], 0.0, lambda _name: 2, lambda _line: None)
    with pytest.raises(NotReadyError, match="agent n1 ended"):
        wait_ready([record], 0.0, lambda _name: None, lambda _line: None)
