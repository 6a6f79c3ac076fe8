"""Apache Kafka in KRaft mode, from Maven Central's jars (ADR 0002): one node, or three.

The jars (43 MB) are fetched once by Maven into our cache, keyed by version; data is on disk and
survives a restart. Needs a JDK or JRE 17 or newer, and Maven for the first start.
"""

import base64
import os
import re
import shutil
import subprocess
import uuid
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from dataplane.broker.cache import cache_directory
from dataplane.broker.contract import BrokerKind, Progress
from dataplane.broker.local import HOST, LocalBroker
from idl.errors import ConfigError, PlatformFaultError

VERSION: Final = "4.3.0"
"""As in pom.xml; a unit test compares them."""
JAVA_MIN: Final = 17
FETCH_TIMEOUT_S: Final = 600
FORMAT_TIMEOUT_S: Final = 60
NODES_ALLOWED: Final = (1, 3)
_JVM: Final = (
    "-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData",
)  # fmt: skip
"""A small broker that starts fast (3.6 s) beats one with peak throughput here."""


def _package_file(name: str) -> str:
    return resources.files("dataplane.broker").joinpath(name).read_text()


def _random_cluster_id() -> str:
    """A Kafka Uuid: 16 bytes in base64url; one that starts with `-` would read as an option."""
    while True:
        found = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not found.startswith("-"):
            return found


def find_java() -> str:
    """The `java` to use. Raises PlatformFaultError that says what to install."""
    home = os.environ.get("JAVA_HOME", "")
    java = shutil.which("java", path=f"{home}/bin") if home else None
    java = java or shutil.which("java")
    if java is None:
        raise PlatformFaultError(
            f"Apache Kafka needs Java {JAVA_MIN} or newer, and no `java` is on PATH; "
            "install a JRE (Debian: openjdk-17-jre-headless)"
        )
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    if found is None or int(found[1]) < JAVA_MIN:
        raise PlatformFaultError(
            f"Apache Kafka needs Java {JAVA_MIN} or newer, and `{java}` is "
            f"{found[1] if found else 'unknown'}; install openjdk-17-jre-headless or set JAVA_HOME"
        )
    return java


def fetch_jars(progress: Progress) -> Path:
    """The directory of Kafka's jars; fetched by Maven if it is not in the cache.

    Raises PlatformFaultError: no `mvn`, or what Maven said.
    """
    jars = cache_directory() / f"apache-kafka-{VERSION}"
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise PlatformFaultError(
            "the first start of Apache Kafka needs Maven to fetch its jars, and no `mvn` is on "
            "PATH; install maven (Debian: maven), or use the embedded broker"
        )
    progress(f"fetching Apache Kafka {VERSION} (43 MB, once) with Maven")
    draft = jars.with_name(f"{jars.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        _run_maven(maven, draft)
        _publish(draft / "jars", jars)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return jars


def _run_maven(maven: str, draft: Path) -> None:
    (draft / "pom.xml").write_text(_package_file("pom.xml"))
    goal = ["dependency:copy-dependencies", f"-DoutputDirectory={draft / 'jars'}"]
    try:
        done = subprocess.run(
            [maven, "-q", "-B", *goal],
            cwd=draft,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PlatformFaultError(
            f"Maven did not fetch Kafka's jars within {FETCH_TIMEOUT_S} s; check the network",
            retryable=True,
        ) from error
    if done.returncode != 0 or not any((draft / "jars").glob("kafka_2.13-*.jar")):
        said = next((x for x in done.stdout.splitlines() if "ERROR" in x), done.stderr)[:200]
        raise PlatformFaultError(
            f"Maven could not fetch Kafka's jars ({said.strip()}); check the network and "
            "Maven's settings, or use the embedded broker",
            retryable=True,
        )


def _publish(made: Path, jars: Path) -> None:
    try:
        made.rename(jars)
    except OSError:
        if not jars.is_dir():  # else another process was faster, with the same files
            raise


class ApacheBroker(LocalBroker):
    """One or three KRaft nodes on the loopback, each broker and controller."""

    kind: BrokerKind = "apache"
    durable = True
    start_timeout_s = 90.0
    ports_per_node = 2

    def __init__(self, directory: Path, nodes: int = 1) -> None:
        if nodes not in NODES_ALLOWED:
            raise ConfigError(f"a local Apache Kafka has 1 or 3 nodes, not {nodes}")
        super().__init__(directory, nodes)
        self._java = ""
        self._jars = Path()

    def _home(self, index: int) -> Path:
        return self.directory / f"node-{index}"

    def _prepare(self, progress: Progress) -> None:
        self._java = find_java()
        self._jars = fetch_jars(progress)
        (self.directory / "log4j2.properties").write_text(_package_file("log4j2.properties"))
        cluster = self._cluster_id()
        for index in range(self.nodes):
            self._home(index).mkdir(exist_ok=True)
            (self._home(index) / "server.properties").write_text(self._properties(index))
            if not (self._home(index) / "data" / "meta.properties").exists():
                progress(f"formatting storage of node {index + 1} of {self.nodes}")
                self._format(index, cluster)
        progress(f"starting Apache Kafka {VERSION} ({self.nodes} node{'s' * (self.nodes > 1)})")

    def _cluster_id(self) -> str:
        path = self.directory / "cluster-id"
        if not path.exists():
            path.write_text(_random_cluster_id())
        return path.read_text()

    def _properties(self, index: int) -> str:
        clients, controllers = self._ports[: self.nodes], self._ports[self.nodes :]
        voters = ",".join(f"{i + 1}@{HOST}:{port}" for i, port in enumerate(controllers))
        return Template(_package_file("server.properties")).substitute(
            node_id=index + 1,
            voters=voters,
            host=HOST,
            port=clients[index],
            controller_port=controllers[index],
            data=self._home(index) / "data",
            replicas=self.nodes,
            min_isr=2 if self.nodes > 1 else 1,
        )

    def _command(self, main: str, *arguments: str) -> list[str]:
        logging = f"-Dlog4j2.configurationFile={self.directory / 'log4j2.properties'}"
        return [self._java, *_JVM, logging, "-cp", f"{self._jars}/*", main, *arguments]

    def _format(self, index: int, cluster: str) -> None:
        properties = str(self._home(index) / "server.properties")
        command = self._command(
            "kafka.tools.StorageTool", "format", "-t", cluster, "-c", properties
        )
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FORMAT_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise PlatformFaultError(f"Kafka could not format its storage: {' '.join(said)}")

    def _argv(self, index: int) -> list[str]:
        if not self._java:  # a restart of one node by a process that did not start the others
            self._java, self._jars = find_java(), fetch_jars(lambda _line: None)
        return self._command("kafka.Kafka", str(self._home(index) / "server.properties"))
