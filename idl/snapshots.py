"""Snapshots of a pool's state: records of the topic `snapshots`, one partition, compacted.

A snapshot is some parts and then one head that names them. The image itself (what a state says) is
`dataplane.core.snapshot`; here it is compressed bytes. Keys: `POOL/SLOT/NUMBER` for a part,
`POOL/SLOT` for a head. The two slots take turns, so that compaction always leaves one whole
snapshot while the next is being written.
"""

from typing import Final

import msgspec

from idl.ids import PoolName
from idl.units import KIB, MIB

SNAPSHOT_VERSION: Final = 1
SNAPSHOT_SLOTS: Final = 2
SNAPSHOT_PART_BYTES: Final = 512 * KIB
"""Far below KAFKA_RECORD_BYTES_MAX, so that looking for the newest head reads little."""
SNAPSHOT_BYTES_MAX: Final = 1024 * MIB
"""Of an image before compression: ten times the largest state within our bounds (measured)."""


class SnapshotHead(msgspec.Struct, frozen=True, kw_only=True):
    """The state after the ledger's entries below `next_offset`.

    `parts`: their offsets in the topic, in order. `checksum`: blake2b-128 of all their bytes.
    `last_entry`: the same of the ledger record before `next_offset`, so that a snapshot is never
    taken for that of another ledger. `previous`: offset of the head before, -1 for none.
    """

    v: int = SNAPSHOT_VERSION
    pool: PoolName
    slot: int
    next_offset: int
    at_ms: int
    state_hash: str
    digest: str
    last_entry: str
    checksum: str
    image_bytes: int
    parts: tuple[int, ...]
    previous: int = -1


def head_key(pool: PoolName, slot: int) -> str:
    """Key of a head; unlike any part's."""
    return f"{pool}/{slot}"


def part_key(pool: PoolName, slot: int, number: int) -> str:
    """Key of a part; `number` from 0."""
    return f"{pool}/{slot}/{number}"
