"""Descriptors: how many there may be, and those that travel beside a message (SCM_RIGHTS of
unix(7)), packed and unpacked.

`socket.send_fds` does the latter, but the module `socket` would add a third to the launcher's
memory. Where the receiver has no number left for one, the kernel drops it and all that follow, and
says so by MSG_CTRUNC alone.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from _socket import CMSG_LEN, SCM_RIGHTS, SOL_SOCKET

TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    from collections.abc import Iterable

_FD_BYTES = 4


def raise_limit() -> None:
    """As many descriptors as we may have: a job takes about ten in the launcher and two to five in
    the agent, and the soft limit is made for select(2), which neither uses."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require(count: int, any_fd: int) -> None:
    """Raises OSError where fewer can still be opened, seen from the lowest number that is free."""
    lowest = os.dup(any_fd)
    os.close(lowest)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft - lowest < count:
        raise OSError(errno.EMFILE, f"of {soft} descriptors {soft - lowest} are left")


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
