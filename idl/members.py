"""Who the coordinators are: one entry of the membership, in the cluster file and in the ledger.

The cluster file gives the membership that a pool starts with. From its first `MembersChanged` on
the ledger says who is a member (ADR 0012); the file still says where the members that it lists are.
"""

from typing import Final

import msgspec

from idl.ids import CoordinatorId

MEMBERS_MAX: Final = 9
"""Every vote and every renewal goes to all: more members make elections slower, not safer."""
NOT_SETTLED: Final = "not settled yet"
"""Begins the reason of a change that is refused for now: the one who asked may ask again."""


class CoordinatorPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator of the membership. `address` may be a name: we resolve it, not DDS.

    `public_keys`: Ed25519, hex, newest first (`outrider keys coordinator`); all members or none.
    """

    name: CoordinatorId
    address: str = "127.0.0.1"
    dds_port: int
    hint_port: int = 0
    preference: int = 0
    public_keys: tuple[str, ...] = ()


Members = tuple[CoordinatorPeer, ...]


def merged(ledger: Members, file: Members) -> Members:
    """The members by the ledger, each as the file describes it where the file lists it.

    So a key is rotated and a host renamed in the files alone; an empty ledger changes nothing.
    """
    described = {peer.name: peer for peer in file}
    return tuple(described.get(peer.name, peer) for peer in ledger) or file
