# ruff: noqa: PTH123
# pathlib would add a third to the launcher's memory.
"""What a sandbox says about itself from the inside: run once at start, in place of a job.

Limits are probed, not assumed: RLIMIT_NPROC inside a user namespace, for example, only holds on
kernels that count processes per namespace (5.14).
"""

from __future__ import annotations

import errno
import os
import time
from _socket import AF_INET, SOCK_DGRAM, socket

TYPE_CHECKING = False  # collections is another import
if TYPE_CHECKING:
    from collections.abc import Callable

# Bits of the probe's exit code: what did *not* hold.
PIDS_LOOSE, NETWORK_LOOSE, FILESYSTEM_LOOSE, PRIVILEGE_LOOSE = 1, 2, 4, 8
RAN = 64  # set in every answer, so that no crash looks like one
# The probe job's own process limit: enough to fork at all, few enough to stay cheap.
PROBE_PIDS_MAX = 6
_FORKS_BEYOND = 4


def inside(pids_max: int) -> int:
    """Try what must fail; returns RAN plus the bits of what did not fail. Notes go to stdout."""
    checks: dict[int, Callable[[], bool]] = {
        PRIVILEGE_LOOSE: _privileges_gone,
        FILESYSTEM_LOOSE: _read_only,
        NETWORK_LOOSE: _unreachable,
        PIDS_LOOSE: lambda: _forks_bounded(pids_max),
    }
    result = RAN
    for bit, holds in checks.items():
        try:
            if not holds():
                result |= bit
        except Exception as error:  # noqa: BLE001 - a check that cannot run counts as not held
            os.write(1, f"{type(error).__name__}: {error}; ".encode())
            result |= bit
    return result


def _privileges_gone() -> bool:
    with open("/proc/self/status", encoding="utf-8") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    # A kernel without ambient capabilities (gVisor of 2022) shows none; they are some of CapPrm.
    shown = {"CapEff", "CapPrm", "CapBnd"} | ({"CapAmb"} & fields.keys())
    no_caps = all(int(fields[name], 16) == 0 for name in shown)
    privileges = fields["NoNewPrivs"].strip() == "1" if "NoNewPrivs" in fields else _asked()
    return no_caps and privileges and fields["Seccomp"].strip() == "2"


def _asked() -> bool:
    """Of a kernel that does not show no_new_privs in ``status``: prctl(2)."""
    import ctypes  # late: a native job, whose kernel shows it, could not

    pr_get_no_new_privs = 39
    return int(ctypes.CDLL(None).prctl(pr_get_no_new_privs, 0, 0, 0, 0)) == 1


def _read_only() -> bool:
    return not any(_writable(path) for path in ("/usr/outrider-probe", "/outrider-probe"))


def _writable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        return error.errno not in {errno.EROFS, errno.EACCES, errno.EPERM}
    return True


def _unreachable() -> bool:
    """An address outside any host: a datagram socket connects if there is a route at all."""
    probe = socket(AF_INET, SOCK_DGRAM)
    try:
        probe.connect(("198.51.100.1", 9))  # TEST-NET-2, RFC 5737
    except OSError as error:
        return error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}  # gVisor's, before 2023
    finally:
        probe.close()
    return False


def _forks_bounded(pids_max: int) -> bool:
    for _ in range(pids_max + _FORKS_BEYOND):
        try:
            child = os.fork()
        except BlockingIOError:
            return True  # EAGAIN: the limit holds
        if child == 0:
            time.sleep(60)  # ends with the namespace, long before
            os._exit(0)
    return False
