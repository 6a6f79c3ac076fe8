"""Writes one snapshot and ends: a short process beside the leader, at low priority (ADR 0008).

It folds the ledger itself, from the newest good snapshot on, so the leader's loop has nothing to do
with it and its state is not copied. Whoever runs it, and however many at once, a snapshot says only
what the ledger says. By hand: `python -m controlplane.snapshotter --config FILE`.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import msgspec

from dataplane.core.state import PoolState
from dataplane.ledger import read_ledger
from dataplane.process import EXIT_FAULT, EXIT_OK, now_ms
from dataplane.snapshots import delete_ledger_below, newest_head, recover, write_snapshot
from idl.errors import OutriderError, PlatformFaultError
from idl.settings import ClusterSettings, load_cluster


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """One line of JSON on stdout. `kept_from`: first ledger offset kept, -1 if none was deleted."""

    next_offset: int
    state_hash: str
    digest: str
    image_bytes: int
    entries_read: int
    took_ms: int
    kept_from: int = -1


def snapshot(settings: ClusterSettings) -> Written:
    """Recovers, folds to the ledger's present end, writes. Raises PlatformFaultError."""
    kafka, pool, begun = settings.kafka, settings.pool, time.monotonic()
    state = recover(kafka, pool, say=_say).state
    start = state.next_offset
    for offset, entry in read_ledger(kafka, pool, start):
        state.apply(offset, entry)
    state.check_invariants()
    before = newest_head(kafka, pool)
    if state.next_offset == 0:
        raise PlatformFaultError("the ledger is empty: there is nothing to write a snapshot of")
    head = write_snapshot(kafka, pool, state, now_ms())
    kept_from = -1
    if settings.snapshots.keep_entries and before is not None:
        kept_from = _delete_old(settings, state, before[1].next_offset)
    return Written(
        next_offset=head.next_offset, state_hash=head.state_hash, digest=head.digest,
        image_bytes=head.image_bytes, entries_read=state.next_offset - start,
        took_ms=int((time.monotonic() - begun) * 1000), kept_from=kept_from,
    )  # fmt: skip


def _delete_old(settings: ClusterSettings, state: PoolState, older: int) -> int:
    """Keeps what recovery from the *older* snapshot needs, and `keep_entries` before that."""
    below = min(older, state.next_offset) - settings.snapshots.keep_entries
    if below <= 0:
        return -1
    try:
        return delete_ledger_below(settings.kafka, settings.pool, below)
    except PlatformFaultError as error:
        _say(str(error))
        return -1


def _say(line: str) -> None:
    sys.stderr.write(f"outrider-snapshotter: {line}\n")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes as a coordinator's."""
    parser = argparse.ArgumentParser(prog="outrider-snapshotter", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="cluster file")
    options = parser.parse_args(argv)
    try:
        written = snapshot(load_cluster(options.config, os.environ))
    except OutriderError as error:
        _say(str(error))
        return EXIT_FAULT
    sys.stdout.write(msgspec.json.encode(written).decode() + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
