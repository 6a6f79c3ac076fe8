"""Changes of the membership: what an operator's order becomes, and why it is refused (ADR 0012).

Pure rules over what the ledger says and who the leader heard. What makes a change safe is the
ledger's order, as ever; what is guarded here is that the cluster can still elect afterwards.
"""

import re
from typing import Final

import msgspec

from dataplane.core.state import PoolState
from idl.ids import is_valid_name
from idl.ledger import MembersChanged
from idl.members import MEMBERS_MAX, NOT_SETTLED, CoordinatorPeer, Members
from idl.records import AddMember, RemoveMember

PORT_MAX: Final = 65_535
ADDRESS_CHARS_MAX: Final = 253
"""Of a domain name (RFC 1035)."""
LABEL_CHARS_MAX: Final = 63
"""Of each part of one."""
KEYS_MAX: Final = 4
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_ADDRESS: Final = re.compile(r"[A-Za-z0-9._:-]+")


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One coordinator of the membership. A higher preference stands earlier."""

    name: str
    preference: int = 0


class Voters(msgspec.Struct, frozen=True):
    """Members that renewed the leader's lease lately, itself among them. `knowing`: those of them
    that have read the newest membership."""

    heard: tuple[str, ...] = ()
    knowing: tuple[str, ...] = ()


def majority(count: int) -> int:
    """Of `count` members."""
    return count // 2 + 1


def changed(
    state: PoolState, file: Members, voters: Voters, order: AddMember | RemoveMember
) -> tuple[MembersChanged | None, str]:
    """The decision that an order asks for, or None and the reason why it is refused.

    `file`: the membership of the cluster file, in force until the ledger has one.
    """
    before = state.members or file
    added = removed = ""
    if isinstance(order, AddMember):
        added = order.member.name
        reason = _wrong(before, order.member)
        after = (*before, order.member)
    else:
        removed = order.name
        reason = _unknown(before, removed)
        after = tuple(peer for peer in before if peer.name != removed)
    reason = reason or _unsettled(before, voters) or _unelectable(before, after, voters)
    if reason:
        return None, reason
    version = state.members_version + 1
    return MembersChanged(version=version, members=after, added=added, removed=removed), ""


def _wrong(before: Members, new: CoordinatorPeer) -> str:
    """Why this one cannot be added; what it says of itself must not break those who believe it."""
    if not is_valid_name(new.name):
        return f"{new.name[:64]!r} is not a name"
    if any(peer.name == new.name for peer in before):
        return f"{new.name} is a member already"
    if len(before) >= MEMBERS_MAX:
        return f"there are {len(before)} members, at most {MEMBERS_MAX}"
    labels = new.address.removesuffix(".").split(".")
    if (
        len(new.address) > ADDRESS_CHARS_MAX
        or not _ADDRESS.fullmatch(new.address)
        or not all(0 < len(label) <= LABEL_CHARS_MAX for label in labels)
    ):
        return f"{new.address[:64]!r} is not an address"
    if not 0 < new.dds_port <= PORT_MAX or not 0 <= new.hint_port <= PORT_MAX:
        return f"ports {new.dds_port} and {new.hint_port} are not both ports"
    for peer in before:
        if (peer.address, peer.dds_port) == (new.address, new.dds_port):
            return f"{peer.name} is at {peer.address}:{peer.dds_port} already"
    if len(new.public_keys) > KEYS_MAX or not all(map(_KEY.fullmatch, new.public_keys)):
        return f"a public key is 64 hex digits, and a member has at most {KEYS_MAX}"
    if before and bool(new.public_keys) != bool(before[0].public_keys):
        return "all members have public keys, or none has"
    return ""


def _unknown(before: Members, name: str) -> str:
    names = [peer.name for peer in before]
    if name not in names:
        return f"{name[:64]!r} is no member; there are {', '.join(names)}"
    return f"{name} is the only member" if len(names) == 1 else ""


def _unsettled(before: Members, voters: Voters) -> str:
    """Majorities of adjacent memberships overlap, those of distant ones need not: a change waits
    until a majority knows the one before, and refuses its vote to who does not."""
    if len(voters.knowing) >= majority(len(before)):
        return ""
    return f"{NOT_SETTLED}: a majority has to know the change before; try again in a moment"


def _unelectable(before: Members, after: Members, voters: Voters) -> str:
    """Why nobody could be elected afterwards, as far as the leader hears. One alone may take a
    second: it cannot hear who is no member yet."""
    names = {peer.name for peer in after}
    heard = names.intersection(voters.heard)
    if len(heard) >= majority(len(after)) or len(before) == 1:
        return ""
    return (
        f"of the {len(after)} members that there would be only {', '.join(sorted(heard))} "
        f"answer{'s' if len(heard) == 1 else ''}, and {majority(len(after))} must: "
        "start or remove the silent ones first"
    )
