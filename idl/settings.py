"""One cluster file (JSON, YAML or TOML) that every process reads, and the environment over it.

Precedence: defaults < file < `OUTRIDER_*` variables. Kafka client settings pass through:
`kafka.client` in the file, or `OUTRIDER_KAFKA_SECURITY_PROTOCOL=SASL_SSL` for
`security.protocol` (lower case, `_` becomes `.`), so that TLS and SASL are configuration only.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import yaml

from idl.errors import ConfigError
from idl.ids import PoolName, QueueName, is_valid_name
from idl.jobs import LIMIT_BOUNDS
from idl.members import CoordinatorPeer

LEASE_HEARTBEATS_MIN: Final = 3
"""A lease is renewed upon heartbeats: with fewer, one that is lost would kill a healthy job."""
KAFKA_ENV_PREFIX: Final = "OUTRIDER_KAFKA_"
_OWN_KAFKA_ENV: Final = {"BOOTSTRAP": "bootstrap", "KIND": "kind", "PREFIX": "prefix"}


class KafkaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach Kafka. `kind` sets the fetch wait (facts: Tansu polls, Apache wakes).

    `start_wait_ms`: how long a process that starts while Kafka is away waits for it. A broker with
    much to recover takes a minute; longer than this, somebody should look at the address.
    """

    bootstrap: str = "127.0.0.1:9092"
    kind: Literal["embedded", "apache", "existing"] = "existing"
    prefix: str = ""
    client: dict[str, str] = {}
    start_wait_ms: int = 120_000
    replication_factor: int = 1
    queue_partitions: int = 1
    topic: dict[str, str] = {}


class DdsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Cyclone DDS. `interface` is a network interface name or address; multicast is never used.

    `intent_shards`: DDS partitions over which agents are spread by name; the same for everybody.
    More shards mean fewer agents that receive an intent meant for another, and more endpoints.
    """

    domain: int = 0
    tag: str = "outrider"
    interface: str = "lo"
    lease_ms: int = 5_000
    intent_shards: int = 16


class ElectionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """0: chosen from the scheduling priority that the process really got (facts/control.md).

    Set both where coordinators get different priorities. `realtime`: ask for SCHED_RR at start.
    """

    heartbeat_ms: int = 0
    timeout_ms: int = 0
    realtime: bool = True


class NodeTiming(msgspec.Struct, frozen=True, kw_only=True):
    """How often nodes report, and after which silence a node is declared lost.

    `exclusive_lease_ms`: an exclusive job's node ends it when no leader has renewed its lease for
    this long. Longer than a Kafka broker's failover (2 to 9 s; nothing is renewed meanwhile), and
    with its margin shorter than `lost_ms`, so that a lost node costs no extra time (ADR 0011).
    """

    report_ms: int = 2_000
    heartbeat_ms: int = 1_000
    lost_ms: int = 15_000
    resend_ms: int = 500
    exclusive_lease_ms: int = 12_000


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Admission of one queue. `live_jobs_max`: more wait in Kafka (backpressure, nothing is lost).

    `depth_max`: pending jobs above which submissions are *rejected*; 0 means never.
    `limits_max`: the most that a job may ask for of a field of `idl.jobs.Limits`, such as
    `{wall_ms: 3600000}`; jobs beyond it are rejected. Without: the system's own bounds.
    """

    live_jobs_max: int = 5_000
    depth_max: int = 0
    limits_max: dict[str, int] = {}


class SnapshotSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When the leader writes a snapshot of the ledger's state, and how long the ledger is kept.

    `every_entries`: recovery reads at most about twice this many (10,000 take about a second).
    `every_ms`: the same in time, for pools with little to do (only after 500 entries; 0: never).
    `keep_entries`: ledger entries kept before the older of two snapshots; 0 keeps the whole ledger
    (`outrider audit` and `events` need it from the start). Apache Kafka only.
    """

    every_entries: int = 5_000
    every_ms: int = 600_000
    keep_entries: int = 0


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pool of a cluster. A coordinator process may be given the files of several pools.

    `images`: for every agent, as its `--image`: `{alpine: "oci:/srv/images/alpine:3.20"}`.
    """

    cluster: str = "outrider"
    pool: PoolName = PoolName("main")
    kafka: KafkaSettings = KafkaSettings()
    dds: DdsSettings = DdsSettings()
    coordinators: tuple[CoordinatorPeer, ...] = ()
    election: ElectionSettings = ElectionSettings()
    nodes: NodeTiming = NodeTiming()
    snapshots: SnapshotSettings = SnapshotSettings()
    queues: dict[QueueName, QueuePolicy] = msgspec.field(
        default_factory=lambda: {QueueName("default"): QueuePolicy()}
    )
    images: dict[str, str] = {}
    secret_file: str = ""
    state_dir: str = ""

    def coordinator(self, name: str) -> CoordinatorPeer:
        """The member `name`. Raises ConfigError."""
        for peer in self.coordinators:
            if peer.name == name:
                return peer
        known = ", ".join(peer.name for peer in self.coordinators) or "none"
        raise ConfigError(f"coordinator {name!r} is not in the cluster file (there: {known})")


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read cluster file {path}: {error.strerror}") from error
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cluster file {path} does not parse: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"cluster file {path} must be a mapping of settings")
    return found


def apply_environment(kafka: KafkaSettings, env: Mapping[str, str]) -> KafkaSettings:
    """`OUTRIDER_KAFKA_*` over the file's Kafka settings."""
    own: dict[str, str] = {}
    client = dict(kafka.client)
    for key, value in env.items():
        if not key.startswith(KAFKA_ENV_PREFIX):
            continue
        name = key.removeprefix(KAFKA_ENV_PREFIX)
        if name in _OWN_KAFKA_ENV:
            own[_OWN_KAFKA_ENV[name]] = value
        else:
            client[name.lower().replace("_", ".")] = value
    raw = msgspec.to_builtins(kafka) | own | {"client": client}
    try:
        return msgspec.convert(raw, KafkaSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"environment {KAFKA_ENV_PREFIX}*: {error}") from error


def _check_lease(nodes: NodeTiming, path: Path) -> None:
    if nodes.exclusive_lease_ms < LEASE_HEARTBEATS_MIN * nodes.heartbeat_ms:
        raise ConfigError(
            f"cluster file {path}: nodes.exclusive_lease_ms is {nodes.exclusive_lease_ms}; it must "
            f"be at least {LEASE_HEARTBEATS_MIN} times nodes.heartbeat_ms ({nodes.heartbeat_ms})"
        )


def load_cluster(path: Path, env: Mapping[str, str]) -> ClusterSettings:
    """Reads and checks a cluster file. Raises ConfigError with the first thing wrong."""
    try:
        settings = msgspec.convert(_parse(path), ClusterSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cluster file {path}: {error}") from error
    for name in (settings.cluster, settings.pool, *settings.queues):
        if not is_valid_name(name):
            raise ConfigError(f"cluster file {path}: {name!r} is not a valid name")
    for queue, policy in settings.queues.items():
        unknown = sorted(policy.limits_max.keys() - LIMIT_BOUNDS.keys())
        if unknown:
            known = ", ".join(sorted(LIMIT_BOUNDS))
            raise ConfigError(
                f"cluster file {path}: limits_max of queue {queue} has {unknown[0]!r}; "
                f"it may have {known}"
            )
    _check_lease(settings.nodes, path)
    if len({bool(peer.public_keys) for peer in settings.coordinators}) > 1:
        raise ConfigError(f"cluster file {path}: some coordinators have public_keys, some have not")
    return msgspec.structs.replace(settings, kafka=apply_environment(settings.kafka, env))
