"""DDS topics: who may write them, and with which QoS (DESIGN, contracts).

KeepLast everywhere: a stalled reader makes a KeepAll `write()` block with the interpreter frozen
(facts/dds.md). What may get lost that way is re-sent by the application.
"""

import zlib
from collections.abc import Iterable
from typing import Final, Literal

import msgspec
from cyclonedds.core import Policy, Qos
from cyclonedds.util import duration

from idl.control import (
    AttemptStatus,
    Ballot,
    BallotReply,
    Beacon,
    ControlBody,
    Intent,
    NodeReport,
    QueueState,
)  # fmt: skip
from idl.ids import CoordinatorId, NodeId
from idl.keys import COORDINATORS, Principal, coordinator_principal, node_principal

DEPTH_STREAM: Final = 256
"""Samples kept per key for a slow reader: a second of traffic; older ones are re-sent by us."""


EVERYBODY: Final = "everybody"
"""Partition of an addressed topic that all its readers read."""

Route = Literal["all", "shard", "addressee"]


class DdsTopic(msgspec.Struct, frozen=True):
    """One topic. `signer` None: signed by the node that is the instance key.

    A write goes to every matched reader and costs about 54 µs for each, and each reader is woken
    (facts/dds.md); `route` keeps it to those concerned, by DDS partitions. `shard`: instances are
    spread by key, an intent reaches the agents of its shard. `addressee`: a message is for one
    coordinator by name, as a status for the leader, or for everybody.
    """

    name: str
    body: type[ControlBody]
    signer: Principal | None
    reliable: bool
    transient_local: bool = False
    depth: int = DEPTH_STREAM
    route: Route = "all"
    gathered: bool = False
    """Its samples may wait a few milliseconds for others (`idl.dds.bus`): a coordinator hears each
    of a thousand nodes every second, and a message alone costs it several times one of many."""

    def principal(self, key: str, sender: str, *, own_keys: bool) -> Principal:
        """Whose signature a message of `sender` with this instance key must carry. `own_keys`:
        coordinators have Ed25519 keys of their own."""
        if self.signer is None:
            return node_principal(NodeId(key))
        return coordinator_principal(CoordinatorId(sender)) if own_keys else self.signer

    def qos(self) -> Qos:
        """Cyclone's policies. `max_blocking_time` 0: a write fails rather than freeze us."""
        reliability = (
            Policy.Reliability.Reliable(duration(seconds=0))
            if self.reliable
            else Policy.Reliability.BestEffort
        )
        durability = (
            Policy.Durability.TransientLocal if self.transient_local else Policy.Durability.Volatile
        )
        return Qos(reliability, durability, Policy.History.KeepLast(self.depth))

    def shard(self, key: str, shards: int) -> int:
        """The shard of an instance, of a topic routed so."""
        return zlib.crc32(key.encode()) % shards

    def written(self, shards: int, addressees: Iterable[str]) -> tuple[str, ...]:
        """Every partition that a writer needs; "" is the default one."""
        match self.route:
            case "all":
                return ("",)
            case "shard":
                return tuple(f"shard-{shard}" for shard in range(shards))
            case "addressee":
                return (EVERYBODY, *(self.partition_of(name, shards) for name in addressees))

    def read(self, name: str, shards: int) -> tuple[str, ...]:
        """What a process of this name reads."""
        own = self.partition_of(name, shards)
        return (EVERYBODY, own) if self.route == "addressee" else (own,)

    def partition_of(self, name: str, shards: int) -> str:
        """Where what is for an instance, or an addressee, of this name is written; "" is no one."""
        match self.route:
            case "all":
                return ""
            case "shard":
                return f"shard-{self.shard(name, shards)}"
            case "addressee":
                return f"to-{name}" if name else EVERYBODY


def partition_qos(*partitions: str) -> Qos | None:
    """QoS of a publisher or subscriber for these partitions; None for the default one."""
    return None if partitions == ("",) else Qos(Policy.Partition(list(partitions)))


BALLOT: Final = DdsTopic("outrider_ballot", Ballot, COORDINATORS, True)
BALLOT_REPLY: Final = DdsTopic(
    "outrider_ballot_reply", BallotReply, COORDINATORS, True, route="addressee"
)
BEACON: Final = DdsTopic("outrider_beacon", Beacon, COORDINATORS, False, depth=8)
INTENT: Final = DdsTopic("outrider_intent", Intent, None, True, route="shard")
ATTEMPT_STATUS: Final = DdsTopic(
    "outrider_attempt_status", AttemptStatus, None, True, route="addressee", gathered=True
)
NODE_REPORT: Final = DdsTopic(
    "outrider_node_report", NodeReport, None, True, True, 1, gathered=True
)
QUEUE_STATE: Final = DdsTopic("outrider_queue_state", QueueState, COORDINATORS, True, True, 1)

ALL: Final = (
    BALLOT, BALLOT_REPLY, BEACON, INTENT, ATTEMPT_STATUS, NODE_REPORT, QUEUE_STATE,
)  # fmt: skip
