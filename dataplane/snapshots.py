"""Snapshots in Kafka: written, found, refused; and recovery from them (ADR 0008).

A snapshot is only ever a faster way to the state that the ledger itself gives. So everything about
it is checked (versions, checksum, state hash, that it is of this very ledger), and one that does
not pass is refused with its reason: the one before it is tried, and then the ledger from its start.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
from confluent_kafka import KafkaException, TopicPartition

from dataplane.core.snapshot import IMAGE_VERSION, Image, image_of, restored
from dataplane.core.state import PoolState
from dataplane.kafka import checked, open_admin
from dataplane.producer import RecordProducer
from dataplane.read import read_one, read_range, watermarks
from dataplane.records import KafkaRecord
from dataplane.topics import partition_counts
from idl.codec import MSGPACK, encode
from idl.errors import LedgerTruncatedError, PlatformFaultError, SnapshotRefusedError
from idl.ids import PoolName
from idl.settings import KafkaSettings
from idl.snapshots import (
    SNAPSHOT_BYTES_MAX,
    SNAPSHOT_PART_BYTES,
    SNAPSHOT_SLOTS,
    SNAPSHOT_VERSION,
    SnapshotHead,
    head_key,
    part_key,
)
from idl.topics import TopicNames

COMPRESSION_LEVEL: Final = 1
"""zlib: names of fields repeat, so the fastest level takes most of the size away (measured: 8×)."""
HEADS_TRIED_MAX: Final = 4
"""Two slots, and as many again where a broker has not compacted or does not compact."""
LOOK_BACK_RECORDS_MAX: Final = 64
"""Records read at once while looking for a head: at most 32 MiB, when a writer died half-way."""
WORTH_A_SNAPSHOT: Final = 1_000
"""A shorter ledger is read sooner than a snapshot is looked for."""
DELETE_TIMEOUT_S: Final = 10.0
_PARTITION: Final = 0

_encoder = msgspec.msgpack.Encoder()
_image_decoder = msgspec.msgpack.Decoder(Image)
_head_decoder = msgspec.msgpack.Decoder(SnapshotHead)


class Recovered(NamedTuple):
    """A state to go on from at `state.next_offset`. `head` None: the ledger's start.

    `notes`: what was refused on the way and why, one line each.
    """

    state: PoolState
    head: SnapshotHead | None = None
    notes: tuple[str, ...] = ()


class _Version(msgspec.Struct):
    v: int = 0


def checksum_of(*pieces: bytes) -> str:
    """blake2b-128 of the concatenation, hex."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


# --- bytes --------------------------------------------------------------------------------------


def pack(state: PoolState) -> tuple[int, tuple[bytes, ...]]:
    """(size before compression, parts of at most SNAPSHOT_PART_BYTES)."""
    image = _encoder.encode(image_of(state))
    packed = zlib.compress(image, COMPRESSION_LEVEL)
    step = SNAPSHOT_PART_BYTES
    return len(image), tuple(packed[i : i + step] for i in range(0, len(packed), step))


def unpack(head: SnapshotHead, parts: list[bytes]) -> PoolState:
    """The state that `head` promises. Raises SnapshotRefusedError: corrupt, or not for us."""
    if checksum_of(*parts) != head.checksum:
        raise SnapshotRefusedError(head.next_offset, "its parts do not match their checksum")
    if not 0 < head.image_bytes <= SNAPSHOT_BYTES_MAX:
        raise SnapshotRefusedError(head.next_offset, f"{head.image_bytes} bytes are no image")
    try:
        image = zlib.decompressobj().decompress(b"".join(parts), head.image_bytes)
        version = msgspec.msgpack.decode(image, type=_Version).v
        if version != IMAGE_VERSION:
            raise SnapshotRefusedError(
                head.next_offset, f"its image has version {version}, known is {IMAGE_VERSION}"
            )
        state = restored(_image_decoder.decode(image))
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotRefusedError(head.next_offset, f"it cannot be read: {error}") from error
    found = (state.next_offset, state.digest.hex(), state.state_hash())
    if found != (head.next_offset, head.digest, head.state_hash):
        raise SnapshotRefusedError(
            head.next_offset, f"it restores to {found[2]} where {head.state_hash} was promised"
        )
    return state


def decode_head(offset: int, value: bytes | None) -> SnapshotHead:
    """Raises SnapshotRefusedError; `offset` is its place in the topic."""
    try:
        version = msgspec.msgpack.decode(value or b"", type=_Version).v
        if version != SNAPSHOT_VERSION:
            raise SnapshotRefusedError(-1, f"head at {offset} has version {version}")
        return _head_decoder.decode(value or b"")
    except msgspec.MsgspecError as error:
        raise SnapshotRefusedError(-1, f"head at {offset} cannot be read: {error}") from error


# --- Kafka --------------------------------------------------------------------------------------


def head_records(settings: KafkaSettings, pool: PoolName) -> Iterator[KafkaRecord]:
    """Records of heads of `pool`, newest first, not judged. Raises BrokerUnavailableError."""
    topic = TopicNames(settings.prefix).snapshots
    if not partition_counts(settings).get(topic):
        return  # a cluster whose topics are older than snapshots
    low, end = watermarks(settings, topic)[_PARTITION]
    keys = {head_key(pool, slot).encode() for slot in range(SNAPSHOT_SLOTS)}
    span = 1
    while end > low:
        start = max(low, end - span)
        records = list(read_range(settings, topic, _PARTITION, start, end))
        yield from (r for r in reversed(records) if r.key in keys and r.value)
        end, span = start, min(span * 8, LOOK_BACK_RECORDS_MAX)


def newest_head(settings: KafkaSettings, pool: PoolName) -> tuple[int, SnapshotHead] | None:
    """(place in the topic, head) of the newest that can be read; its parts are not looked at."""
    for record in head_records(settings, pool):
        try:
            return record.offset, decode_head(record.offset, record.value)
        except SnapshotRefusedError:
            continue  # recovery names it; here an older one does as well
    return None


def read_snapshot(settings: KafkaSettings, head: SnapshotHead) -> PoolState:
    """The state behind `head`. Raises SnapshotRefusedError, BrokerUnavailableError."""
    topic = TopicNames(settings.prefix).snapshots
    wanted = dict.fromkeys(head.parts, b"")
    if not wanted:
        raise SnapshotRefusedError(head.next_offset, "it has no parts")
    low = watermarks(settings, topic)[_PARTITION][0]
    start = max(low, min(wanted))
    for record in read_range(settings, topic, _PARTITION, start, max(wanted) + 1):
        if record.offset in wanted:
            wanted[record.offset] = record.value or b""
    if not all(wanted.values()):
        raise SnapshotRefusedError(head.next_offset, "parts of it are not in Kafka any more")
    return unpack(head, list(wanted.values()))


def write_snapshot(
    settings: KafkaSettings, pool: PoolName, state: PoolState, at_ms: int
) -> SnapshotHead:
    """Writes the state; the head goes last, so half a snapshot is none. Raises PlatformFaultError.

    Two writers at once do no harm: each head names its own parts.
    """
    topic = TopicNames(settings.prefix).snapshots
    before = newest_head(settings, pool)
    slot = 0 if before is None else (before[1].slot + 1) % SNAPSHOT_SLOTS
    size, parts = pack(state)
    producer = RecordProducer(settings, name="snapshots")
    try:
        sent = [
            producer.send(topic, part, key=part_key(pool, slot, number), partition=_PARTITION)
            for number, part in enumerate(parts)
        ]
        head = SnapshotHead(
            pool=pool, slot=slot, next_offset=state.next_offset, at_ms=at_ms,
            state_hash=state.state_hash(), digest=state.digest.hex(),
            last_entry=_last_entry(settings, pool, state.next_offset),
            checksum=checksum_of(*parts), image_bytes=size,
            parts=tuple(one.result().offset for one in sent),
            previous=-1 if before is None else before[0],
        )  # fmt: skip
        key = head_key(pool, slot)
        producer.send(
            topic, encode(head), key=key, content_type=MSGPACK, partition=_PARTITION
        ).result()
    finally:
        producer.close()
    return head


def _last_entry(settings: KafkaSettings, pool: PoolName, next_offset: int) -> str:
    ledger = TopicNames(settings.prefix).ledger(pool)
    record = read_one(settings, ledger, _PARTITION, next_offset - 1)
    return "" if record is None else checksum_of(record.value or b"")


# --- recovery -----------------------------------------------------------------------------------


def recover(
    settings: KafkaSettings,
    pool: PoolName,
    *,
    worth: int = WORTH_A_SNAPSHOT,
    say: Callable[[str], None] = lambda _line: None,
) -> Recovered:
    """The newest good snapshot's state, else an empty one: go on at `state.next_offset`.

    A ledger of fewer than `worth` entries is left to be read whole. `say` is told what is refused.
    Raises LedgerTruncatedError (the ledger's start was deleted and no snapshot is good),
    BrokerUnavailableError.
    """
    ledger = TopicNames(settings.prefix).ledger(pool)
    low, high = watermarks(settings, ledger)[_PARTITION]
    notes: list[str] = []
    if low == 0 and high < worth:
        return Recovered(PoolState())
    for tried, record in enumerate(head_records(settings, pool)):
        if tried == HEADS_TRIED_MAX:
            break
        try:
            head = decode_head(record.offset, record.value)
            _check_place(settings, pool, head, low, high)
            return Recovered(read_snapshot(settings, head), head, tuple(notes))
        except SnapshotRefusedError as error:
            notes.append(str(error))
            say(str(error))
    if low > 0:
        raise LedgerTruncatedError(ledger, low, tuple(notes))
    if notes:
        say("no good snapshot; reading the ledger from its start")
    return Recovered(PoolState(), None, tuple(notes))


def _check_place(
    settings: KafkaSettings, pool: PoolName, head: SnapshotHead, low: int, high: int
) -> None:
    if not low <= head.next_offset <= high:
        raise SnapshotRefusedError(
            head.next_offset, f"the ledger holds offsets {low} to {high - 1}: not of this ledger"
        )
    if head.next_offset > low and head.last_entry != _last_entry(settings, pool, head.next_offset):
        raise SnapshotRefusedError(head.next_offset, "the entry before it is not the one it saw")


def require_start(settings: KafkaSettings, pool: PoolName) -> None:
    """Raises LedgerTruncatedError where the ledger's first records were deleted."""
    ledger = TopicNames(settings.prefix).ledger(pool)
    low = watermarks(settings, ledger)[_PARTITION][0]
    if low > 0:
        raise LedgerTruncatedError(ledger, low)


def delete_ledger_below(settings: KafkaSettings, pool: PoolName, offset: int) -> int:
    """Deletes ledger records below `offset` (Kafka DeleteRecords, KIP-107); the new first offset.

    Raises PlatformFaultError: the broker refuses, or cannot (Tansu: it would hang up on us).
    """
    if settings.kind == "embedded":
        raise PlatformFaultError("the embedded broker cannot delete records; keep_entries stays 0")
    where = TopicPartition(TopicNames(settings.prefix).ledger(pool), _PARTITION, offset)
    admin = open_admin(settings)  # its thread completes the future: it must outlive the call
    try:
        done = admin.delete_records([where], request_timeout=DELETE_TIMEOUT_S)[where].result()
    except KafkaException as error:
        raise checked(error, "deleting old ledger records", settings) from error
    return int(done.low_watermark)
