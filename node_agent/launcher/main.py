"""The launcher's loop: one socket to the agent, one pidfd and one control socket per job.

Messages are JSON objects, one per SOCK_SEQPACKET record; descriptors travel beside them. When the
agent goes away (end of file) everything is killed and removed, then the launcher ends.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import sys
import time
from _socket import (
    AF_UNIX,
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socket,
)

from node_agent.launcher import jobs, kernel, probe, setup
from node_agent.launcher.cgroups import JobCgroup
from node_agent.launcher.child import JobSpec
from node_agent.launcher.jobs import Job
from node_agent.launcher.rootfs import StepError

# One request record; the agent's plan check keeps commands well below it.
MESSAGE_BYTES_MAX = 1 << 18
_STDIO_COUNT = 3
# A cgroup directory stays busy until the kernel has dropped its last task; look again this often.
_REMOVE_AGAIN_S = 0.005
# The self-test is watched without the loop; how often to read its init's messages.
_PROBE_LOOK_S = 0.002
# The collector is off (it would touch every page in every child); exceptions still make cycles.
_COLLECT_EVERY_JOBS = 1000
# On shutdown: how long cgroup directories may take before they are left to the next start's sweep.
_CLOSE_S_MAX = 5.0


class Launcher:
    """Owns the jobs of one agent."""

    def __init__(self, agent: socket, environment: setup.Environment, slots: int) -> None:
        self._agent, self._env = agent, environment
        self._jobs: dict[str, Job] = {}
        self._by_fd: dict[int, tuple[Job, str]] = {}
        self._poll = select.epoll()
        self._poll.register(agent.fileno(), select.EPOLLIN)
        self._free_slots = list(range(slots))
        self._sequence = 0
        self._dying: list[JobCgroup] = []
        # Answers the agent has not taken yet: two a job at most, and jobs are bounded by slots.
        self._outbox: list[tuple[bytes, int]] = []
        self._closing = False

    # --- the loop -----------------------------------------------------------------------------
    def run(self) -> None:
        """Until the agent says close or goes away; then until nothing is left."""
        while not self._closing or self._jobs:
            for fd, event in self._poll.poll(self._timeout_s()):
                if event & select.EPOLLOUT:
                    self._flush()
                if event & ~select.EPOLLOUT:
                    self._on_ready(fd)
            now = time.monotonic()
            for job in list(self._jobs.values()):
                if now >= job.next_deadline():
                    job.on_time(now)
            self._dying = [cgroup for cgroup in self._dying if not cgroup.remove()]
        self._remove_all()

    def _timeout_s(self) -> float:
        waits = [_REMOVE_AGAIN_S] if self._dying else []
        if self._jobs:
            soonest = min(job.next_deadline() for job in self._jobs.values())
            waits.append(max(0.0, soonest - time.monotonic()))
        return min(waits) if waits else -1

    def _on_ready(self, fd: int) -> None:
        if fd == self._agent.fileno():
            self._on_agent()
            return
        job, kind = self._by_fd.get(fd, (None, ""))
        if job is None:
            return  # closed by an event of the same batch
        if kind == "control":
            answer = job.on_control()
            if answer == "started":
                self._announce(job)
            elif answer == "closed":
                self._forget_fd(fd)
        elif kind == "oom":
            job.on_oom(time.monotonic())
        else:
            self._on_exit(job)

    def _on_agent(self) -> None:
        space = CMSG_LEN(4 * _STDIO_COUNT)
        try:
            data, ancillary, _, _ = self._agent.recvmsg(MESSAGE_BYTES_MAX, space, MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, ancillary = b"", []
        fds = [
            int.from_bytes(packed[at : at + 4], sys.byteorder)
            for _, _, packed in ancillary
            for at in range(0, len(packed) - 3, 4)
        ]
        if not data:
            self._shut_down()
            return
        message = json.loads(data)
        if message["op"] == "run":
            self._start(message, fds)
        elif message["op"] == "kill":
            job = self._jobs.get(message["key"])
            if job is not None:
                job.stop("killed", str(message["why"]), time.monotonic())
                if message["now"]:
                    job.kill_now()
        elif message["op"] == "close":
            self._shut_down()

    def _shut_down(self) -> None:
        """The agent is gone or leaves: every job ends now, without grace."""
        self._closing = True
        self._forget_fd(self._agent.fileno())
        for job in self._jobs.values():
            job.ended_by, job.why = job.ended_by or "killed", job.why or "agent closed the sandbox"
            job.kill_now()

    # --- jobs ---------------------------------------------------------------------------------
    def _start(self, message: dict[str, object], stdio: list[int]) -> None:
        key = str(message["key"])
        try:
            if len(stdio) != _STDIO_COUNT:
                raise OSError(errno.EBADF, f"expected {_STDIO_COUNT} descriptors")
            if not self._free_slots:
                raise OSError(errno.EAGAIN, "all job slots are taken")
            job = self._launch(message, stdio)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "?")
            detail = f"step 'launch', {name}: {error}"
            self._send({"op": "ended", "key": key, "cause": "sandbox_failed", "detail": detail})
            return
        finally:
            for fd in stdio:
                os.close(fd)
        self._jobs[key] = job
        self._watch(job)

    def _launch(self, message: dict[str, object], stdio: list[int]) -> Job:
        slot = self._free_slots[-1]
        env = self._env
        uid = env.uid_base + (slot if env.mode == "root" else 0)
        spec = JobSpec(message, uid, uid if env.gid < 0 else env.gid)
        self._sequence += 1
        if self._sequence % _COLLECT_EVERY_JOBS == 0:
            gc.collect()
        job = jobs.prepare(env.tree, _cgroup_name(self._sequence, spec.key), spec, slot)
        try:
            job.launch(env.shared, stdio)
        except OSError:
            job.close()
            self._dying.append(job.cgroup)
            raise
        self._free_slots.pop()
        spec.argv, spec.env = (
            [],
            {},
        )  # may hold secrets: later jobs' inits are copies of this memory
        return job

    def _watch(self, job: Job) -> None:
        fds = [(job.pidfd, "exit"), (job.cgroup.oom_event_fd, "oom")]
        if job.control is not None:
            fds.append((job.control.fileno(), "control"))
        for fd, kind in fds:
            if fd >= 0:
                self._by_fd[fd] = (job, kind)
                self._poll.register(fd, select.EPOLLIN)

    def _forget_fd(self, fd: int) -> None:
        if self._by_fd.pop(fd, None) is not None or fd == self._agent.fileno():
            try:
                self._poll.unregister(fd)
            except FileNotFoundError:
                return  # forgotten before

    def _announce(self, job: Job) -> None:
        self._send({"op": "started", "key": job.spec.key})

    def _on_exit(self, job: Job) -> None:
        announced = job.started
        ended = job.reap()
        if ended is None:
            return
        if job.started and not announced:
            self._announce(job)
        message: dict[str, object] = {"op": "ended", "key": job.spec.key}
        message.update(job.outcome(ended))
        result_fd, refused = job.open_result()
        message["result_refused"] = refused
        self._send(message, result_fd)
        for fd in [fd for fd, (owner, _) in self._by_fd.items() if owner is job]:
            self._forget_fd(fd)
        job.close()
        if not job.cgroup.remove():
            self._dying.append(job.cgroup)
        del self._jobs[job.spec.key]
        self._free_slots.append(job.slot)

    def _send(self, message: dict[str, object], fd: int = -1) -> None:
        """Queue and try to send; never blocks, so a stalled agent cannot stall the deadlines."""
        self._outbox.append((json.dumps(message).encode(), fd))
        self._flush()

    def _flush(self) -> None:
        while self._outbox:
            data, fd = self._outbox[0]
            rights = [(SOL_SOCKET, SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))] if fd >= 0 else []
            try:
                self._agent.sendmsg([data], rights, MSG_DONTWAIT)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                if not self._closing:
                    self._shut_down()
            if fd >= 0:
                os.close(fd)
            del self._outbox[0]
        if not self._closing:
            wanted = select.EPOLLIN | (select.EPOLLOUT if self._outbox else 0)
            self._poll.modify(self._agent.fileno(), wanted)

    def _remove_all(self) -> None:
        deadline = time.monotonic() + _CLOSE_S_MAX
        while self._dying and time.monotonic() < deadline:
            self._dying = [cgroup for cgroup in self._dying if not cgroup.remove()]
            time.sleep(_REMOVE_AGAIN_S)
        self._env.tree.remove()

    # --- the probe ----------------------------------------------------------------------------
    def probe_job(self, message: dict[str, object]) -> dict[str, object]:
        """Run the self-test in place of a job and wait for it: the outcome it had."""
        notes, notes_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        stdio = [null, notes_write, os.dup(null)]
        job = self._launch(message, stdio)
        for fd in stdio:
            os.close(fd)
        while True:
            wait_s = max(0.0, job.next_deadline() - time.monotonic())
            select.select([job.pidfd], [], [], min(wait_s, _PROBE_LOOK_S))
            job.on_control()
            job.on_time(time.monotonic())
            ended = job.reap()
            if ended is not None:
                break
        outcome = job.outcome(ended)
        outcome["notes"] = os.read(notes, MESSAGE_BYTES_MAX).decode("utf-8", "replace")
        os.close(notes)
        job.close()
        self._dying.append(job.cgroup)
        self._free_slots.append(job.slot)
        return outcome


def _cgroup_name(sequence: int, key: str) -> str:
    """Unique even for a repeated key, and never the name of a cgroup file (none has ``j1-``)."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in key)
    return f"j{sequence}-{safe[:64]}"


def _hello(env: setup.Environment, outcome: dict[str, object]) -> dict[str, object]:
    code = outcome.get("exit_code")
    return {
        "op": "hello",
        "mode": env.mode,
        "cgroup": env.tree.kind,
        "holds": sorted(env.tree.holds),
        "cgroup_problems": [
            f"cgroup {', '.join(names)}: {reason}" for reason, names in env.tree.problems.items()
        ],
        "probe_cause": outcome["cause"],
        "probe_detail": f"{outcome['detail']} {outcome.get('notes', '')}".strip(),
        "loose": code & ~probe.RAN if isinstance(code, int) and code & probe.RAN else -1,
        "loose_bits": {
            "pids": probe.PIDS_LOOSE,
            "network": probe.NETWORK_LOOSE,
            "filesystem": probe.FILESYSTEM_LOOSE,
            "seccomp": probe.PRIVILEGE_LOOSE,
        },
        "landlock_abi": kernel.landlock_abi(),
        "device_filter": env.device_filter,
        "notes": env.notes,
    }


def main(agent_fd: int) -> int:
    """Entry point: read the settings, set up, probe, serve."""
    agent = socket(AF_UNIX, SOCK_SEQPACKET, 0, agent_fd)
    os.set_inheritable(agent_fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides when we stop
    settings = json.loads(agent.recv(MESSAGE_BYTES_MAX))
    slots = int(settings["jobs_max"])
    sys.path.clear()  # the standard library is out of reach once we pivot: no late imports
    try:
        if not kernel.SUPPORTED:
            raise StepError("machine", OSError(errno.ENOSYS, os.uname().machine))
        env = setup.prepare(settings, slots, os.getppid())
    except (StepError, OSError) as error:
        step = error.step if isinstance(error, StepError) else "set-up"
        answer = {"op": "unavailable", "step": step, "errno": error.errno, "detail": str(error)}
        agent.send(json.dumps(answer).encode())
        return 1
    launcher = Launcher(agent, env, slots)
    try:
        outcome = launcher.probe_job(settings["probe"])
    except OSError as error:
        outcome = {"cause": "sandbox_failed", "detail": str(error)}
    # Pages of objects that live for ever are not touched by the collector in every forked child.
    gc.collect()
    gc.freeze()
    gc.disable()
    agent.send(json.dumps(_hello(env, outcome)).encode())
    launcher.run()
    return 0
