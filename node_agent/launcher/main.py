"""The launcher's loop: one socket to the agent, one pidfd and one control socket per job.

Messages are JSON objects (`Doors` carries them). An agent that goes away (end of file) ends
everything, unless there is a named socket on which its next process can call (ADR 0006): then jobs
run on, their ends are kept, and only after a bounded time without any agent is everything killed
and removed. In the end the launcher ends.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import sys
import time
from _socket import AF_UNIX, SOCK_SEQPACKET, socket

from node_agent.launcher import jobs, kernel, probe, rights, setup, wire
from node_agent.launcher.cgroups import Remains
from node_agent.launcher.child import JobSpec, Shape
from node_agent.launcher.doors import (
    BACKLOG,
    FEED_FDS,
    MESSAGE_BYTES_MAX,
    RUN_FDS,
    STDIO_COUNT,
    Doors,
)
from node_agent.launcher.jobs import Job
from node_agent.launcher.kept import Feed, Kept, Outputs, detached
from node_agent.launcher.prepared import Prepared
from node_agent.launcher.rootfs import StepError
from node_agent.launcher.signals import signal

# The agent's next process may be of another version: it does not talk to a launcher that says
# another number here (ADR 0006).
PROTOCOL = 2
# A cgroup directory stays busy until the kernel has dropped its last task; look again this often.
_REMOVE_AGAIN_S = 0.005
# Nothing has happened for so long: a sandbox can be made ahead without delaying a short job.
_QUIET_S = 0.002
# The self-test is watched without the loop; how often to read its init's messages.
_PROBE_LOOK_S = 0.002
# A job's end is told when its init says that nobody else lives. Init itself takes longer to go, and
# keeps its slot until then: at most so many at once, beyond which ends are told when it is gone.
_LEAVING_MAX = 16
# No sandbox is made with fewer descriptors left: those that run are looked after by opening files.
_SPARE_FDS = 64
# The collector is off (it would touch every page in every child); exceptions still make cycles.
_COLLECT_EVERY_JOBS = 1000
# On shutdown: how long cgroup directories may take before they are left to the next start's sweep.
_CLOSE_S_MAX = 5.0
_NEVER = float("inf")
# epoll_wait(2) takes an int of milliseconds, 24 days; jobs may have longer, so look again sooner.
_WAIT_S_MAX = 3600.0


class Launcher:
    """Owns the jobs of one agent."""

    def __init__(
        self, doors: Doors, environment: setup.Environment, settings: dict[str, object]
    ) -> None:
        self._doors, self._env = doors, environment
        self._orphan_grace_s = float(str(settings["orphan_grace_s"]))
        self._prepared = Prepared(int(str(settings["prepared"])))
        self._orphan_ends_at = _NEVER
        self._jobs: dict[str, Job] = {}
        self._kept: dict[str, Kept] = {}
        self._outputs: dict[str, Outputs] = {}
        self._feeds: dict[str, Feed] = {}
        self._by_fd: dict[int, tuple[Job, str]] = {}
        self._poll = select.epoll()
        doors.watch(self._poll)
        self._free_slots = list(range(_slots(settings)))
        self._sequence = 0
        self._dying: list[Remains] = []
        self._closing = False
        self.hello = b""

    # --- the loop -----------------------------------------------------------------------------
    def run(self) -> None:
        """Until told to close, or nobody is left to serve; then until nothing is left."""
        while not self._closing or self._jobs or self._prepared.alive:
            events = self._poll.poll(self._timeout_s())
            for fd, event in events:
                self._on_event(fd, event)
            now = time.monotonic()
            for job in list(self._jobs.values()):
                if now >= job.next_deadline():
                    if job.looks.for_idleness and self._outputs[job.key].moved():
                        job.looks.output = True
                    job.on_time(now)
            if not self._prepared.unfinished:  # else the kernel might let us wait for its lock
                self._dying = [left for left in self._dying if not left.remove()]
            if not events:  # jobs first: what is made ahead can wait
                self._prepare()
            if now >= self._orphan_ends_at and not self._closing:
                self._shut_down(f"no agent came for {self._orphan_grace_s:g} s")
        self._remove_all()

    def _timeout_s(self) -> float:
        waits = [_REMOVE_AGAIN_S] if self._dying else []
        missing = self._to_prepare()
        if missing is not None:
            at_once = missing[1]
            if at_once:
                return 0
            waits.append(_QUIET_S)
        soonest = min((job.next_deadline() for job in self._jobs.values()), default=_NEVER)
        if not self._closing:
            soonest = min(soonest, self._orphan_ends_at)
        if soonest != _NEVER:
            waits.append(min(max(0.0, soonest - time.monotonic()), _WAIT_S_MAX))
        return min(waits) if waits else -1

    def _on_event(self, fd: int, event: int) -> None:
        job, kind = self._by_fd.get(fd, (None, ""))
        if job is not None and kind == "feed":
            feed = self._feeds[job.key]
            if feed.on_writable():
                self._end_feed(job.key)
            return
        if event & select.EPOLLOUT:
            self._doors.flush()
        if event & ~select.EPOLLOUT:
            self._on_ready(fd)

    def _end_feed(self, key: str) -> None:
        feed = self._feeds.pop(key, None)
        if feed is not None:
            self._forget_fd(feed.pipe_fd)
            feed.close()

    def _on_ready(self, fd: int) -> None:
        if fd == self._doors.agent_fd:
            self._on_agent()
            return
        if fd == self._doors.listener_fd:
            self._on_call()
            return
        if fd == self._doors.stop_fd:
            self._shut_down("the launcher was told to stop")
            return
        job, kind = self._by_fd.get(fd, (None, ""))
        if job is None:
            return  # closed by an event of the same batch
        if kind == "control":
            answer = job.on_control()
            if answer == "started":
                self._announce(job)
            elif answer == "ended":
                self._on_empty(job)
            elif answer == "closed":
                self._forget_fd(fd)
        elif kind == "oom":
            job.on_oom(time.monotonic())
        else:
            self._on_exit(job)

    # --- the agent ----------------------------------------------------------------------------
    def _on_agent(self) -> bool:
        """Takes one message. False where there was none: nothing said now, or gone."""
        received = self._doors.receive()
        if received is None:
            return False
        data, fds = received
        if not data:
            self._agent_gone()
            return False
        message = wire.loads(data)
        if message["op"] == "run":
            self._start(message, fds)
        elif message["op"] == "forget":
            self._forget(str(message["key"]))
        elif message["op"] == "close":
            self._shut_down("agent closed the sandbox")
        elif message["key"] in self._jobs:
            self._about(self._jobs[message["key"]], message)
        return True

    @staticmethod
    def _about(job: Job, message: dict[str, object]) -> None:
        """What the agent says about a job that is here."""
        if message["op"] == "kill":
            cause = str(message.get("cause", "killed"))
            job.stop(cause, str(message["why"]), time.monotonic())
            if message["now"]:
                job.kill_now()
        elif message["op"] == "active":
            job.looks.output = True
        elif message["op"] == "lease":
            job.extend(int(str(message["until_ms"])))

    def _agent_gone(self) -> None:
        """End of file. With work at hand and a way to come back we wait for the next agent."""
        self._doors.hang_up()
        if self._doors.listener_fd < 0 or not (self._jobs or self._kept):
            self._shut_down("agent closed the sandbox")
            return
        self._orphan_ends_at = time.monotonic() + self._orphan_grace_s
        for outputs in self._outputs.values():
            outputs.grow()

    def _on_call(self) -> None:
        """The agent's next process: it learns what we are, what runs and what has ended."""
        if self._doors.listener_fd < 0:
            return  # closed by an event of the same batch
        caller = self._doors.accept()
        while self._on_agent():  # what a dead agent still said comes first
            continue
        if caller is None:
            return
        if self._doors.agent is not None or self._closing:
            caller.close()  # a second agent, or too late
            return
        self._doors.admit(caller)
        self._orphan_ends_at = _NEVER
        self._doors.send(self.hello)
        for key in [*self._jobs, *self._kept]:
            job, outputs = self._jobs.get(key), self._outputs.get(key)
            have = {"op": "have", "key": key, "started": job is not None and job.started}
            self._doors.send(wire.dumps(have), tuple(outputs.fds) if outputs else ())
        for key in self._kept:
            self._tell_end(key)
        self._send({"op": "had"})

    def _forget(self, key: str) -> None:
        """The agent has stored the end of this job (or never had one)."""
        if key in self._jobs:
            return  # not at its end yet
        kept, outputs = self._kept.pop(key, None), self._outputs.pop(key, None)
        if kept is not None:
            kept.close()
        if outputs is not None:
            outputs.close()

    def _shut_down(self, why: str) -> None:
        """Every job ends now, without grace, and nobody is listened to any more."""
        if self._closing:
            return
        self._closing = True
        self._doors.close()
        for job in self._jobs.values():
            job.ended_by, job.why = job.ended_by or "killed", job.why or why
            job.kill_now()
        for job in self._prepared.alive:
            job.kill_now()

    # --- jobs ---------------------------------------------------------------------------------
    def _start(self, message: dict[str, object], fds: list[int]) -> None:
        key, stdio = str(message["key"]), fds[:STDIO_COUNT]
        caps = [int(str(message[f"{name}_bytes_max"])) for name in ("stdout", "stderr")]
        inputs = [fds.pop()] if message["inputs"] and len(fds) > RUN_FDS else []
        stdio += inputs
        known = key in self._jobs or key in self._kept
        if len(fds) not in {RUN_FDS, RUN_FDS + FEED_FDS} or known:
            for fd in fds + inputs:
                os.close(fd)
            detail = f"step 'launch': {len(fds)} descriptors, or an attempt that is still here"
            self._send({"op": "ended", "key": key, "cause": "sandbox_failed", "detail": detail})
            return
        self._outputs[key] = Outputs(fds[STDIO_COUNT:RUN_FDS], caps)
        if len(fds) > RUN_FDS:
            self._feeds[key] = Feed(*fds[RUN_FDS:])
        try:
            spec = JobSpec(message)
            if 0 < spec.lease_until_ms <= kernel.boot_ms():
                raise OSError(errno.ETIME, "the lease ran out before the job was launched")
            job = self._launch(spec, stdio)
        except OSError as error:
            for fd in stdio:
                os.close(fd)
            self._outputs.pop(key).close()  # there will be none; descriptors may be what lacks
            self._end(key, _failed("launch", error), (-1, -1))
            return
        self._jobs[key] = job
        feed = self._feeds.get(key)
        if feed is not None:
            self._by_fd[feed.pipe_fd] = (job, "feed")
            self._poll.register(feed.pipe_fd, select.EPOLLOUT)

    def _launch(self, spec: JobSpec, stdio: list[int]) -> Job:
        """Takes ``stdio`` unless it raises OSError."""
        job = self._prepared.take(spec.shape) or self._fork(spec.shape)
        try:
            job.assign(spec, stdio, self._env.tree.disks)
        except OSError:
            self._prepared.ending.append(job)
            job.kill_now()
            raise
        return job

    def _fork(self, shape: Shape) -> Job:
        """A new sandbox that waits for its job. Raises OSError; nothing is left then."""
        job = self._make(shape)
        try:
            job.launch(self._env.shared, self._env.ids(job.slot))
        except OSError:
            self._release(job)
            raise
        self._watch(job)
        return job

    def _check_room(self) -> None:
        """For one sandbox more. Raises OSError."""
        if not self._free_slots:
            raise OSError(errno.EAGAIN, "all job slots are taken")
        rights.require(_SPARE_FDS, self._poll.fileno())

    def _make(self, shape: Shape) -> Job:
        self._check_room()
        self._sequence += 1
        if self._sequence % _COLLECT_EVERY_JOBS == 0:
            gc.collect()
        self._env.shared.images.ready(shape.image)
        job = jobs.make(self._env.tree, f"j{self._sequence}", shape, self._free_slots[-1])
        self._free_slots.pop()
        return job

    def _to_prepare(self) -> tuple[Shape, bool] | None:
        """Of which shape to make a sandbox once there is nothing else to do, and whether in the
        next free moment or in a quiet one."""
        if self._doors.agent is None or self._closing or self._prepared.unfinished:
            return None
        return self._prepared.missing()

    def _prepare(self) -> None:
        """A sandbox for a job that will come, judging by those that came. One at a time: there may
        be something to do again."""
        missing = self._to_prepare()
        if missing is not None:
            try:
                self._prepared.waiting.append(self._fork(missing[0]))
            except OSError:
                self._prepared.forget()  # a job that finds none makes its own, or says why not
        for job in self._prepared.surplus():
            job.kill_now()

    def _watch(self, job: Job) -> None:
        fds = [(job.pidfd, "exit"), (job.cgroup.oom_event_fd, "oom")]
        if job.control is not None:
            fds.append((job.control.fileno(), "control"))
        for fd, kind in fds:
            if fd >= 0:
                self._by_fd[fd] = (job, kind)
                self._poll.register(fd, select.EPOLLIN)

    def _forget_fd(self, fd: int) -> None:
        if self._by_fd.pop(fd, None) is not None:
            try:
                self._poll.unregister(fd)
            except FileNotFoundError:
                return  # forgotten before

    def greet(self) -> None:
        """Tell the first agent what we are."""
        self._doors.send(self.hello)

    def _announce(self, job: Job) -> None:
        self._send({"op": "started", "key": job.key})

    def _on_empty(self, job: Job) -> None:
        """Its init has reaped everybody else and is about to end."""
        if job.status is None or not job.key or len(self._prepared.ending) >= _LEAVING_MAX:
            return  # ill told, told before, or to be told when init is gone
        self._conclude(job, 0)
        job.key = ""
        self._prepared.ending.append(job)
        job.kill_init()  # not on its word alone

    def _on_exit(self, job: Job) -> None:
        announced = job.started
        ended = job.reap()
        if job.started and not announced and job.key:
            self._announce(job)
        if ended is None:
            self._follow(job)
        elif job.key:
            self._conclude(job, ended)
            self._release(job)  # nobody waits for it
        else:
            self._prepared.ended(job)
            self._release(job)

    def _follow(self, job: Job) -> None:
        """Watch what the job now consists of: here its init, from beginning to end."""

    def _conclude(self, job: Job, ended: int) -> None:
        """Its end is told, its result taken."""
        outcome, fds = job.outcome(ended), (-1, -1)
        try:
            fds, outcome["result_refused"] = self._left_by(job)
        except OSError as error:
            if outcome["cause"] == "exited":  # no success without what it was for
                outcome |= _failed("result", error)
        del self._jobs[job.key]
        self._end(job.key, outcome, fds)

    def _left_by(self, job: Job) -> tuple[tuple[int, int], str]:
        """Descriptors of its result and, where wanted, of its work directory; why there is no
        result. Raises OSError."""
        result_fd, refused = job.open_result()
        if result_fd >= 0 and self._doors.agent is None:
            result_fd = detached(result_fd, job.result_bytes_max)
        try:
            work_fd = os.dup(job.work_fd) if job.collects and job.work_fd >= 0 else -1
        except OSError:
            if result_fd >= 0:
                os.close(result_fd)
            raise
        return (result_fd, work_fd), refused

    def _release(self, job: Job) -> None:
        control = -1 if job.control is None else job.control.fileno()
        for fd in (job.pidfd, job.cgroup.oom_event_fd, control):
            self._forget_fd(fd)
        job.close()
        self._dying.append(job.remains)
        self._free_slots.append(job.slot)

    def _end(self, key: str, outcome: dict[str, object], fds: tuple[int, int]) -> None:
        self._end_feed(key)
        self._kept[key] = Kept({"key": key, **outcome}, fds)
        self._tell_end(key)

    def _tell_end(self, key: str) -> None:
        kept = self._kept[key]
        self._doors.send(kept.message, tuple(kept.fds))

    def _send(self, message: dict[str, object]) -> None:
        self._doors.send(wire.dumps(message))

    def _remove_all(self) -> None:
        self._env.shared.close()
        deadline = time.monotonic() + _CLOSE_S_MAX
        while self._dying and time.monotonic() < deadline:
            self._dying = [left for left in self._dying if not left.remove()]
            time.sleep(_REMOVE_AGAIN_S)
        self._env.tree.remove()

    # --- the probe ----------------------------------------------------------------------------
    def probe_job(self, message: dict[str, object]) -> dict[str, object]:
        """Run the self-test in place of a job and wait for it: the outcome it had."""
        notes, notes_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        nothing, no_more = os.pipe2(os.O_CLOEXEC)
        os.close(no_more)  # a pipe: runsc gives what it gets to the user of its sandbox (chown(2))
        stdio = [nothing, notes_write, os.dup(notes_write)]
        job = self._launch(JobSpec(message), stdio)
        while True:
            wait_s = max(0.0, job.next_deadline() - time.monotonic())
            select.select([job.pidfd], [], [], min(wait_s, _PROBE_LOOK_S))
            job.on_control()
            job.on_time(time.monotonic())
            ended = job.reap()
            if ended is not None:
                break
        outcome = job.outcome(ended)
        self._release(job)  # and the notes' last writer, in case it never started
        outcome["notes"] = os.read(notes, MESSAGE_BYTES_MAX).decode("utf-8", "replace")
        os.close(notes)
        return outcome

    @staticmethod
    def set_up(settings: dict[str, object], slots: int, agent_pid: int) -> setup.Environment:
        """Once, before there is a launcher. Raises StepError."""
        return setup.prepare(settings, slots, agent_pid)

    def describe(self, outcome: dict[str, object]) -> dict[str, object]:
        """The first message to an agent: what this launcher holds, as its self-test found it."""
        return _hello(self._env, outcome)


def _failed(step: str, error: OSError) -> dict[str, object]:
    name = errno.errorcode.get(error.errno or 0, "?")
    return {"cause": "sandbox_failed", "detail": f"step {step!r}, {name}: {error}"}


def _slots(settings: dict[str, object]) -> int:
    """A uid each for jobs, for what is prepared for jobs and for what is left of some."""
    return int(str(settings["jobs_max"])) + int(str(settings["prepared"])) + _LEAVING_MAX


def _hello(env: setup.Environment, outcome: dict[str, object]) -> dict[str, object]:
    code = outcome.get("exit_code")
    return {
        "op": "hello",
        "protocol": PROTOCOL,
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
        "io_problem": env.io_problem,
        "notes": env.notes,
        "image_paths": env.shared.images.paths,
    }


def main(
    agent_fd: int,
    listener_fd: int,
    kind: type[Launcher] = Launcher,
) -> int:
    """Entry point: read the settings, set up, probe, serve. ``listener_fd``: -1 for none."""
    agent = socket(AF_UNIX, SOCK_SEQPACKET, 0, agent_fd)
    os.set_inheritable(agent_fd, False)
    listener = None
    if listener_fd >= 0:
        os.set_inheritable(listener_fd, False)
        listener = socket(AF_UNIX, SOCK_SEQPACKET, 0, listener_fd)
        listener.listen(BACKLOG)  # here: SO_PEERCRED names this process to callers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides when we stop
    # Blocked in init too, which waits for it; a job starts with an empty mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    settings = wire.loads(agent.recv(MESSAGE_BYTES_MAX))
    sys.path.clear()  # the standard library is out of reach once we pivot: no late imports
    try:
        if not kernel.SUPPORTED:
            raise StepError("machine", OSError(errno.ENOSYS, os.uname().machine))
        rights.raise_limit()
        stop_fd = kernel.signalfd(signal.SIGTERM)
        env = kind.set_up(settings, _slots(settings), os.getppid())
    except (StepError, OSError) as error:
        step = error.step if isinstance(error, StepError) else "set-up"
        answer = {"op": "unavailable", "step": step, "errno": error.errno, "detail": str(error)}
        agent.send(wire.dumps(answer))
        return 1
    launcher = kind(Doors(agent, listener, stop_fd), env, settings)
    try:
        outcome = launcher.probe_job(settings["probe"])
    except OSError as error:
        outcome = {"cause": "sandbox_failed", "detail": str(error)}
    # Pages of objects that live for ever are not touched by the collector in every forked child.
    gc.collect()
    gc.freeze()
    gc.disable()
    launcher.hello = wire.dumps({**launcher.describe(outcome), "build": settings["build"]})
    launcher.greet()
    launcher.run()
    return 0
