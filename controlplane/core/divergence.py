"""Do leader and standby, at the same place of the ledger, hold the same state?

The leader's beacon names its place in the ledger and the digest of what its fold did up to there
(`PoolState.digest`); whoever has been at the same place compares. A difference means that two
programs read one history differently: our bug, bad memory, or versions that do not agree.
"""

from collections import deque

from controlplane.core.bounds import CLAIMS_MAX, DIGESTS_KEPT
from idl.control import Beacon


class DigestWatch:
    """The digests of this process by ledger offset, and what others claimed ahead of it."""

    def __init__(self) -> None:
        self._mine: dict[int, bytes] = {}
        self._order: deque[int] = deque()
        self._claims: dict[int, tuple[str, str]] = {}
        """Offset not yet applied here → (who, digest)."""

    def applied(self, next_offset: int, digest: bytes) -> str:
        """This process is at `next_offset` now. Returns what differs, in words; "" for nothing."""
        self._mine[next_offset] = digest
        self._order.append(next_offset)
        if len(self._order) > DIGESTS_KEPT:
            del self._mine[self._order.popleft()]
        if not self._claims:
            return ""
        claim = self._claims.pop(next_offset, None)
        for passed in [offset for offset in self._claims if offset < next_offset]:
            del self._claims[passed]
        return _difference(next_offset, digest.hex(), *claim) if claim else ""

    def heard(self, beacon: Beacon, next_offset: int) -> str:
        """A leader's claim, `next_offset` being where this process is. Returns what differs."""
        if not beacon.state_digest:
            return ""
        mine = self._mine.get(beacon.ledger_offset)
        if mine is not None:
            return _difference(beacon.ledger_offset, mine.hex(), beacon.leader, beacon.state_digest)
        if beacon.ledger_offset > next_offset and len(self._claims) < CLAIMS_MAX:
            self._claims[beacon.ledger_offset] = (beacon.leader, beacon.state_digest)
        return ""


def _difference(offset: int, mine: str, who: str, theirs: str) -> str:
    if mine == theirs:
        return ""
    return (
        f"at ledger offset {offset} our state is {mine} and {who} says {theirs}: one of us reads "
        "the ledger wrongly; run `outrider audit`, then restart the one that is wrong"
    )
