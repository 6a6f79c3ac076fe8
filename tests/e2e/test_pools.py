"""One coordinator process serves two pools: leads are spread, one dies, the other takes both."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from dataplane.broker import open_broker
from dataplane.topics import ensure_topics
from idl.ids import CoordinatorId, PoolName
from idl.jobs import LimitName
from idl.members import CoordinatorPeer
from idl.settings import ClusterSettings, DdsSettings, KafkaSettings
from idl.topics import TopicNames
from outrider.client.client import Client
from outrider.client.job import ALL_LIMITS, Job
from outrider.client.view import LedgerView
from outrider.local import machine
from tests.e2e.conftest import hand_over, wait_until

pytestmark = pytest.mark.timeout(180)
WAIT_S = 60
FAVOURITE = {"red": "c1", "blue": "c2"}


class Two:
    """Two pools of one cluster: two files, one broker, three coordinators for both, a node each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = open_broker("embedded", folder / "broker")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.files: dict[str, Path] = {}

    def start(self) -> None:
        self.broker.start()
        secret = self.folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text("ab" * 32)
        domain = machine.free_dds_domain(5, start=77)
        hints = machine.free_tcp_ports(3)
        for pool, favourite in FAVOURITE.items():
            settings = ClusterSettings(
                cluster="two",
                pool=PoolName(pool),
                kafka=KafkaSettings(
                    bootstrap=self.broker.bootstrap, kind="embedded", prefix=f"{pool}."
                ),
                dds=DdsSettings(domain=domain, tag=f"two-{hints[0]}"),
                coordinators=tuple(
                    CoordinatorPeer(
                        name=CoordinatorId(f"c{n + 1}"), hint_port=hint,
                        dds_port=machine.coordinator_dds_port(domain, n),
                        preference=int(f"c{n + 1}" == favourite),
                    )
                    for n, hint in enumerate(hints)
                ),
                secret_file=str(secret),
                state_dir=str(self.folder / "state"),
            )  # fmt: skip
            self.files[pool] = self.folder / f"{pool}.json"
            self.files[pool].write_bytes(msgspec.json.encode(settings))
            names = TopicNames(settings.kafka.prefix)
            ensure_topics(settings.kafka, names.table(settings.pool, tuple(settings.queues), 1))
        both = [word for file in self.files.values() for word in ("--config", str(file))]
        for name in ("c1", "c2", "c3"):
            self.spawn(name, "controlplane.coordinator", *both)
        for pool, file in self.files.items():
            self.spawn(
                f"n-{pool}", "node_agent.agent", "--config", str(file), "--cpu", "1",
                "--memory", "256Mi",
            )  # fmt: skip

    def spawn(self, name: str, module: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, "--name", name, *words], stdout=log, stderr=log
            )

    def view(self, pool: str) -> LedgerView:
        settings = msgspec.json.decode(self.files[pool].read_bytes(), type=ClusterSettings)
        view = LedgerView(settings)
        view.advance()
        return view

    def give(self, pool: str, favourite: str, after: int = 0) -> None:
        """The favourite leads a term later than `after`, by order where another one does."""
        wait_until(lambda: self.view(pool).state.term > after, f"nobody leads {pool}", WAIT_S)
        if self.view(pool).leader != favourite:
            hand_over(self.files[pool], favourite, WAIT_S)
        assert self.view(pool).leader == favourite

    def run_a_job(self, pool: str) -> str:
        deadline = time.monotonic() + WAIT_S
        while not any(not node.lost for node in self.view(pool).state.nodes.values()):
            assert time.monotonic() < deadline, f"no node of {pool} was seen"
            time.sleep(0.2)
        held = {name for node in self.view(pool).state.nodes.values() for name in node.enforces}
        without: tuple[LimitName, ...] = tuple(name for name in ALL_LIMITS if name not in held)
        job = Job(("/bin/echo", pool), cpu="100m", memory="32Mi", allow_unenforced=without)
        with Client(self.files[pool]) as client:
            return str(client.submit(job).wait(WAIT_S).phase)

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self.broker.stop()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    found = Two(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def test_leads_of_two_pools_are_spread_and_one_process_can_hold_both(two: Two) -> None:
    for pool, favourite in FAVOURITE.items():
        two.give(pool, favourite)
        assert two.run_a_job(pool) == "finished"
    red, blue = two.view("red").state.term, two.view("blue").state.term
    assert not two.view("red").state.nodes.keys() & two.view("blue").state.nodes.keys()
    two.processes["c1"].send_signal(signal.SIGKILL)
    two.give("red", "c2", after=red)  # by name, as a rule: the favourite is gone
    assert two.view("blue").leader == "c2"
    for pool in FAVOURITE:
        assert two.run_a_job(pool) == "finished"
    after = [t.why for t in two.view("red").state.terms if t.term > red]
    assert after[0] == "the process of c1 is gone"
    others = [t.why for t in two.view("blue").state.terms if t.term > blue]
    assert not any("c1" in why for why in others), "the other pool's lead was never touched"


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        peer = CoordinatorPeer(name=CoordinatorId("c1"), dds_port=held.getsockname()[1])
    red = ClusterSettings(pool=PoolName("red"), coordinators=(peer,))
    for other, why in (
        (red, "given twice"),
        (replace(red, pool=PoolName("blue")), "would share their topics"),
        (replace(red, pool=PoolName("blue"), secret_file="x"), "differ in `secret_file`"),
    ):
        words = []
        for number, settings in enumerate((red, other)):
            file = tmp_path / f"{number}.json"
            file.write_bytes(msgspec.json.encode(settings))
            words += ["--config", str(file)]
        done = subprocess.run(
            [sys.executable, "-m", "controlplane.coordinator", "--name", "c1", *words],
            capture_output=True, text=True, check=False, timeout=WAIT_S,
        )  # fmt: skip
        assert done.returncode == 2 and why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
