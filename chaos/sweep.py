"""Finds and removes what crashed runs left: clusters, namespaces, links, disks, folders."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from chaos.faults import network
from chaos.faults.world import unmount_left
from dataplane.broker import attach_broker
from outrider.local.cluster import LocalCluster
from outrider.local.process import Identity, identity_of, is_alive
from outrider.local.record import layout

FOLDER_PREFIX: Final = "outrider-"
KINDS: Final = ("chaos", "demo")
"""A folder is called outrider-KIND-PID-…, the cluster in it KIND-PID."""
OWNER_FILE: Final = "chaos-owner.json"


def mark_owner(folder: Path) -> None:
    """Notes that this process runs the cluster in `folder`."""
    layout(folder=folder).claim()
    me = identity_of(os.getpid())
    (folder / OWNER_FILE).write_bytes(msgspec.json.encode(me))


def _abandoned() -> list[Path]:
    found = []
    home = Path(tempfile.gettempdir())
    for folder in (one for kind in KINDS for one in home.glob(f"{FOLDER_PREFIX}{kind}-*")):
        try:
            owner = msgspec.json.decode((folder / OWNER_FILE).read_bytes(), type=Identity)
        except (OSError, msgspec.MsgspecError):
            continue  # not a run's folder, or not ours to read
        if not is_alive(owner):
            found.append(folder)
    return found


def clean(say: Callable[[str], None]) -> list[str]:
    """Removes what runs left whose process is gone. Returns what it removed."""
    removed = []
    for folder in _abandoned():
        name = "-".join(folder.name.removeprefix(FOLDER_PREFIX).split("-")[:2])
        cluster = LocalCluster.attach(name, folder)
        if cluster is not None:
            removed += cluster.stop(say)
        broker = attach_broker(folder / "namespaced-broker")
        if broker is not None:
            broker.stop()
        removed += unmount_left(folder)
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(f"folder {folder}")
    return removed + network.sweep()
