"""DDS topics: who may write them, and with which QoS (DESIGN, contracts).

KeepLast everywhere: a stalled reader makes a KeepAll `write()` block with the interpreter frozen
(facts/dds.md). What may get lost that way is re-sent by the application.
"""

import zlib
from typing import Final

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


class DdsTopic(msgspec.Struct, frozen=True):
    """One topic. `signer` None: signed by the node that is the instance key.

    `sharded`: instances are spread over DDS partitions by key, because a write goes to every
    matched reader: an intent then reaches the agents of its shard, not all (facts/dds.md).
    """

    name: str
    body: type[ControlBody]
    signer: Principal | None
    reliable: bool
    transient_local: bool = False
    depth: int = DEPTH_STREAM
    sharded: bool = False

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
        """The shard of an instance; -1 where the topic is not sharded."""
        return zlib.crc32(key.encode()) % shards if self.sharded else -1


def partition_qos(shard: int) -> Qos | None:
    """QoS of a publisher or subscriber for one shard."""
    return None if shard < 0 else Qos(Policy.Partition([f"shard-{shard}"]))


BALLOT: Final = DdsTopic("outrider_ballot", Ballot, COORDINATORS, True)
BALLOT_REPLY: Final = DdsTopic("outrider_ballot_reply", BallotReply, COORDINATORS, True)
BEACON: Final = DdsTopic("outrider_beacon", Beacon, COORDINATORS, False, depth=8)
INTENT: Final = DdsTopic("outrider_intent", Intent, None, True, sharded=True)
ATTEMPT_STATUS: Final = DdsTopic("outrider_attempt_status", AttemptStatus, None, True)
NODE_REPORT: Final = DdsTopic("outrider_node_report", NodeReport, None, True, True, 1)
QUEUE_STATE: Final = DdsTopic("outrider_queue_state", QueueState, COORDINATORS, True, True, 1)

ALL: Final = (
    BALLOT, BALLOT_REPLY, BEACON, INTENT, ATTEMPT_STATUS, NODE_REPORT, QUEUE_STATE,
)  # fmt: skip
