"""Where the coordinators are: names become addresses, again and again (facts/dds.md).

Cyclone takes addresses only (an unresolvable name there calls abort()) and takes them once. So we
resolve, off the loop, and where a peer is somewhere else the link leaves its DDS domain and joins
it again with the new addresses: 13 ms, in-process.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final

from idl.dds.domain import resolve
from idl.errors import ConfigError
from idl.members import CoordinatorPeer

RESOLVE_EVERY_S: Final = 5.0
"""A pod that moved is found within this and its name's time to live; one lookup per peer is cheap.
A name that does not resolve is asked for again as often."""

log = logging.getLogger(__name__)


class PeerAddresses:
    """The peers of one process and what their names resolved to last. `look_up` blocks."""

    def __init__(self, lookup: Callable[[str], str] = resolve) -> None:
        self._lookup = lookup
        self._found: dict[str, str] = {}
        self._unresolved: set[str] = set()

    def look_up(self, peers: Iterable[CoordinatorPeer]) -> frozenset[str]:
        """`address:port` of every peer that ever resolved. A name that does not is one log line,
        and keeps the address that it had."""
        wanted = {peer.name: peer for peer in peers}
        for name, peer in wanted.items():
            try:
                self._found[name] = f"{self._lookup(peer.address)}:{peer.dds_port}"
            except ConfigError as error:
                if name not in self._unresolved:
                    self._unresolved.add(name)
                    log.warning("peer not found yet", extra={"peer": name, "reason": str(error)})
            else:
                if name in self._unresolved:
                    self._unresolved.discard(name)
                    log.info("peer found", extra={"peer": name, "address": self._found[name]})
        return frozenset(where for name, where in self._found.items() if name in wanted)
