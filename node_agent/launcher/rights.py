"""Descriptors that travel beside a message (SCM_RIGHTS of unix(7)), packed and unpacked.

`socket.send_fds` does it, but the module `socket` would add a third to the launcher's memory.
"""

from __future__ import annotations

import sys
from _socket import CMSG_LEN, SCM_RIGHTS, SOL_SOCKET

TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    from collections.abc import Iterable

_FD_BYTES = 4


def room(count: int) -> int:
    """Bytes of ancillary data that ``count`` descriptors need in ``recvmsg``."""
    return CMSG_LEN(_FD_BYTES * count)


def beside(fds: Iterable[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data of ``sendmsg`` that takes ``fds`` along; none for none."""
    packed = b"".join(fd.to_bytes(_FD_BYTES, sys.byteorder) for fd in fds)
    return [(SOL_SOCKET, SCM_RIGHTS, packed)] if packed else []


def taken(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that ``recvmsg`` brought, which are the caller's from now on."""
    return [
        int.from_bytes(packed[at : at + _FD_BYTES], sys.byteorder)
        for _, _, packed in ancillary
        for at in range(0, len(packed) - _FD_BYTES + 1, _FD_BYTES)
    ]
