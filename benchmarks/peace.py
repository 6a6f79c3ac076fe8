"""No election without a reason: a healthy cluster beside busy loops, and how often its leader
changed.

Every term after the first is a false election: nothing is killed, paused or cut. The load is that
of `benchmarks.failover`; the busy loops run at ordinary priority, four per core by default.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from benchmarks.failover import Load, Watcher
from idl.errors import OutriderError
from outrider.local.cluster import LocalCluster, LocalOptions

TELL_S: Final = 30.0


class Peace(msgspec.Struct, kw_only=True):
    """What a run found. `terms_lost`: elections that nothing called for."""

    broker: str
    minutes: float
    burners: int
    terms_lost: int
    why: list[str]


def peace(broker: str, minutes: float, burners: int, console: Console) -> Peace:
    """Runs a cluster beside `burners` busy loops. Raises OutriderError."""
    options = LocalOptions(
        name=f"peace-{os.getpid()}", kafka=broker,
        folder=Path(tempfile.mkdtemp(prefix="outrider-peace-")),
    )  # fmt: skip
    busy: list[subprocess.Popen[bytes]] = []
    with LocalCluster.start(options) as cluster:
        watcher, load = Watcher(cluster.settings), Load(cluster.settings)
        try:
            time.sleep(3)
            first = watcher.term
            busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(burners)]
            for _ in range(round(minutes * 60 / TELL_S) or 1):
                time.sleep(min(TELL_S, minutes * 60))
                console.print(f"{broker}: term {watcher.term}, began with {first}")
        finally:
            for one in busy:
                one.kill()
                one.wait()
            load.close()
            watcher.close()
    found = Peace(
        broker=broker, minutes=minutes, burners=burners, terms_lost=watcher.term - first,
        why=watcher.why[1:],
    )  # fmt: skip
    LocalCluster.purge(cluster.place)
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: no false election; 1: some, or the run failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peace", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--burners", type=int, default=4 * (os.cpu_count() or 1))
    parser.add_argument("--brokers", default="embedded,apache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        rows = [
            peace(broker, options.minutes, options.burners, console)
            for broker in options.brokers.split(",")
        ]
    except OutriderError as error:
        sys.stderr.write(f"peace: {error}\n")
        return 1
    if options.json:
        print(msgspec.json.encode(rows).decode())
    for one in rows:
        console.print(
            f"{one.broker}: {one.terms_lost} false elections in {one.minutes:g} minutes beside "
            f"{one.burners} busy loops on {os.cpu_count()} CPUs"
        )
        for reason in one.why:
            console.print(f"  {reason}")
    return 1 if any(one.terms_lost for one in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
