"""The native sandbox as the agent uses it: start or adopt a launcher, run many jobs, close.

This side is asyncio and reads the pipes; the launcher process holds the privileges and the jobs.
No job is ever run here, and none without its limits. With a home, the launcher outlives an agent
that dies: the agent's next process adopts it and resumes its jobs (ADR 0006).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from node_agent.sandbox import seccomp
from node_agent.sandbox.backend import oci_setup
from node_agent.sandbox.channel import Channel, LauncherProcess, call, spawn
from node_agent.sandbox.plan import (
    CommandRefused,
    Enforcement,
    LimitNotEnforced,
    PlanRefused,
    SandboxOutcome,
    SandboxPlan,
    SandboxUnavailable,
    plan_problem,
    unheld,
)
from node_agent.sandbox.protocol import (
    Hello,
    Message,
    enforcement,
    plan_message,
    read_result,
    unavailable_text,
)
from node_agent.sandbox.settings import SandboxSettings, problem
from node_agent.sandbox.streams import OutputPump, input_of

Stream = Literal["stdout", "stderr"]
OnOutput = Callable[[Stream, bytes], None]
OnWork = Callable[[int], Awaitable[None]]
"""Gets the work directory of a job that has ended, as a descriptor that is closed afterwards."""

_STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")
# What the launcher's first message must say (node_agent.launcher.main.PROTOCOL).
PROTOCOL = 2
_LAUNCHER_CODE = Path(__file__).resolve().parents[1] / "launcher"
# A launcher that did not end a job within this after its lease was over is killed, and the job with
# it: leaders count on that (controlplane.core.bounds.LEASE_KILL_MS).
FENCE_TIMEOUT_S = 1.0
# How long the launcher may take to kill and remove everything before it is killed itself.
CLOSE_TIMEOUT_S = 15.0
# Once it has ended, what it said last is in our socket; more than that may hold the other end open.
LAST_WORDS_S = 2.0
# Of the time that a launcher may take to start: its self-test, so that what failed can still be
# said. A runtime written in Go needs more than 10 s for its first start in an emulated machine.
SELF_TEST_SHARE = 0.5
# Output is told to the launcher this often within a job's idle time, twice for each look of its.
_ACTIVITY_LOOKS = 16
# And no more often than twice for the launcher's most frequent look (looks.py), however short that
# idle time is: it is not the job that pays for it.
_ACTIVITY_S_MIN = 0.01


class _Ended(msgspec.Struct, frozen=True):
    message: Message
    result: bytes | None
    work_fd: int = -1


class _Running:
    """One job between ``run`` (or ``resume``) and its outcome."""

    def __init__(self, on_started: Callable[[], None] | None) -> None:
        self.on_started = on_started
        self.ended: asyncio.Future[_Ended] = asyncio.get_running_loop().create_future()


class _Found:
    """One job of an adopted launcher that nobody has resumed yet."""

    def __init__(self, started: bool, fds: list[int]) -> None:
        self.started, self.fds = started, fds
        self.ended: _Ended | None = None

    def close(self) -> None:
        """Nobody takes it over."""
        _close(self.fds)
        if self.ended is not None and self.ended.work_fd >= 0:
            os.close(self.ended.work_fd)


class NativeSandbox:
    """Runs jobs in namespaces, cgroups and a seccomp filter through one launcher process."""

    def __init__(
        self, settings: SandboxSettings, channel: Channel, process: LauncherProcess
    ) -> None:
        self.settings = settings
        self._channel, self._process = channel, process
        self._running: dict[str, _Running] = {}
        self._found: dict[str, _Found] = {}
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[bytes] = loop.create_future()
        self._listed: asyncio.Future[None] = loop.create_future()
        self._dead, self._left = "", False
        self._oci: dict[str, Any] | None = None
        self.died = asyncio.Event()
        self.enforcement: Enforcement
        self.outdated = False
        """The launcher runs other code, or has other settings, than a new one would."""
        self.launcher_pid = process.pid

    # --- life ---------------------------------------------------------------------------------
    @classmethod
    async def start(cls, settings: SandboxSettings, home: Path | None = None) -> NativeSandbox:
        """Spawn the launcher, sweep what a dead one left, probe. Raises SandboxUnavailable.

        With ``home``, a directory of ours alone, the launcher keeps its jobs when we die, and
        ``adopt`` finds it there. Jobs never see it, even below a visible path.
        """
        wrong = problem(settings)
        if wrong is not None:
            raise SandboxUnavailable(f"sandbox settings: {wrong}")
        machine = platform.machine()
        if machine not in seccomp.MACHINES:
            raise SandboxUnavailable(
                f"no seccomp filter for machine {machine!r}; supported: {seccomp.MACHINES}"
            )
        oci = None if settings.backend == "native" else oci_setup(settings, machine, home)
        if home is not None:
            settings = _hiding(settings, home)
        try:
            channel, process = await spawn(settings, home)
        except OSError as error:
            raise SandboxUnavailable(f"the launcher did not start: {error}") from error
        sandbox = cls(settings, channel, process)
        sandbox._oci = oci
        channel.listen(sandbox._on_message_bytes)
        try:
            await sandbox._handshake(machine)
        except BaseException:
            await sandbox._abandon()
            raise
        return sandbox

    @classmethod
    async def adopt(cls, settings: SandboxSettings, home: Path) -> NativeSandbox | None:
        """The launcher that an earlier agent process left in ``home``; None where none answers.

        ``found`` names its jobs: each is to be resumed or discarded. It goes on with the settings
        it was started with. One that does not answer properly is killed, and its jobs with it.
        """
        called = call(home)
        if called is None:
            return None
        sandbox = cls(_hiding(settings, home), *called)
        sandbox._channel.listen(sandbox._on_message_bytes)
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                sandbox._take_hello(await sandbox._hello)
                await sandbox._listed
        except (SandboxUnavailable, TimeoutError, msgspec.ValidationError):
            if sandbox.alive:  # else its pid may be another's by now
                sandbox._process.kill()
            await sandbox._abandon()
            return None
        return sandbox

    async def _handshake(self, machine: str) -> None:
        self_test_ms = int(self.settings.start_timeout_s * 1000 * SELF_TEST_SHARE)
        probe = SandboxPlan(
            key="probe", argv=("probe",), pids_max=6, wall_ms=self_test_ms, grace_ms=0
        )
        init = {
            **msgspec.to_builtins(self.settings),
            "seccomp": seccomp.encode(seccomp.build_filter(machine)).hex(),
            "probe": {**plan_message(probe), "probe": True},
            "build": build_of(self.settings),
            "oci": self._oci,
        }
        await self._channel.send(init, ())
        try:
            async with asyncio.timeout(self.settings.start_timeout_s):
                data = await self._hello
        except TimeoutError:
            raise SandboxUnavailable(
                f"the launcher did not answer within {self.settings.start_timeout_s} s"
            ) from None
        self._take_hello(data)

    def _take_hello(self, data: bytes) -> None:
        answer: dict[str, Any] = msgspec.json.decode(data)
        if answer.get("op") != "hello":
            last = self.launcher_stderr.strip().rpartition("\n")[2]
            raise SandboxUnavailable(unavailable_text(answer, last))
        hello = msgspec.convert(answer, Hello, strict=True)
        if hello.protocol != PROTOCOL:
            raise SandboxUnavailable(f"the launcher speaks version {hello.protocol}")
        if hello.probe_cause != "exited" or hello.loose < 0:
            raise SandboxUnavailable(
                f"the sandbox's self-test failed ({hello.probe_cause}: {hello.probe_detail}); "
                "no job can be run safely here"
            )
        if hello.backend.partition(" ")[0] != self.settings.backend:
            raise SandboxUnavailable(f"the launcher runs jobs by {hello.backend}")
        self.enforcement = enforcement(hello)
        self.outdated = hello.build != build_of(self.settings)

    async def close(self) -> None:
        """Kill every job, remove everything, wait for the launcher to end. Idempotent; nothing
        after `detach`."""
        if self._left:
            return
        if not self._dead:
            with contextlib.suppress(SandboxUnavailable):  # it may die meanwhile
                await self._channel.send({"op": "close"}, ())
        await self._process.gone(CLOSE_TIMEOUT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self.died.wait()  # at end of file: how its jobs ended is heard before
        self._on_dead("the sandbox was closed")
        await self._abandon()

    async def _abandon(self) -> None:
        self._on_dead("the sandbox was closed")
        self._channel.close()
        await self._process.gone(CLOSE_TIMEOUT_S)  # it ends by itself at end of file
        self._process.close()
        self._left = True

    def detach(self) -> None:
        """Leave: the launcher keeps the jobs for our next process. Every ``run`` is cancelled."""
        for running in self._running.values():
            running.ended.cancel()
        self._on_dead("the agent left its jobs to its next process")
        self._channel.close()
        self._process.close()
        for found in self._found.values():
            found.close()
        self._left = True

    @property
    def busy(self) -> bool:
        """True while the launcher has a job of ours, or one that was not resumed yet."""
        return bool(self._running or self._found)

    @property
    def alive(self) -> bool:
        """False once the launcher is gone: start a new sandbox (which sweeps first)."""
        return not self._dead

    # --- jobs ---------------------------------------------------------------------------------
    async def run(
        self,
        plan: SandboxPlan,
        stdin: bytes,
        on_output: OnOutput | None = None,
        on_started: Callable[[], None] | None = None,
        *,
        keep: bool = False,
        inputs_fd: int = -1,
        on_work: OnWork | None = None,
    ) -> SandboxOutcome:
        """Run one job to its end.

        ``inputs_fd``: the plan's inputs, one after the other (``streams.pack``); it is taken.
        ``on_work``: with outputs in the plan, collects them before this returns.
        ``on_output`` gets at most the plan's caps; ``on_started`` is called once exec succeeded.
        ``keep``: the launcher remembers the end until ``forget``, so that it can be stored first.
        Raises PlanRefused, LimitNotEnforced, SandboxUnavailable, or OSError (no descriptor is left)
        before anything is launched.
        Cancelling kills the job at once and waits for its end.
        """
        inputs = (inputs_fd,) if inputs_fd >= 0 else ()
        try:
            self._refuse(plan)
            if bool(plan.inputs) != bool(inputs):
                raise PlanRefused("inputs and their bytes come together, or not at all")
        except BaseException:
            _close(inputs)
            raise
        running = _Running(on_started)
        self._running[plan.key] = running
        try:
            return await self._run(plan, running, stdin, on_output, inputs, on_work)
        finally:
            self._running.pop(plan.key, None)
            if not keep:
                await self.forget(plan.key)

    async def resume(
        self,
        plan: SandboxPlan,
        seen: dict[Stream, int],
        on_output: OnOutput | None = None,
        on_started: Callable[[], None] | None = None,
        *,
        on_work: OnWork | None = None,
    ) -> SandboxOutcome:
        """Go on with a job of ``found`` to its end, which the launcher keeps until ``forget``.

        ``seen``: bytes of each stream that were read before. Raises KeyError where there is none.
        """
        found = self._found.pop(plan.key)
        running = _Running(on_started)
        if found.ended is not None:
            running.ended.set_result(found.ended)
        elif self._dead:
            running.ended.set_result(_died(self._dead))
        if found.started and on_started is not None:
            on_started()
        self._running[plan.key] = running
        caps = (plan.stdout_bytes_max, plan.stderr_bytes_max)
        try:
            pumps = [
                OutputPump(fd, cap, _sink(on_output, name), seen.get(name, 0))
                for fd, cap, name in zip(found.fds, caps, _STREAMS, strict=False)
            ]
            return await self._to_the_end(plan, running, pumps, on_work)
        finally:
            self._running.pop(plan.key, None)

    @property
    def found(self) -> frozenset[str]:
        """Keys of the jobs of an adopted launcher that were neither resumed nor discarded."""
        return frozenset(self._found)

    async def discard(self, key: str) -> None:
        """Kill a job of ``found`` at once; nobody wants to know its end."""
        found = self._found.pop(key)
        found.close()
        if found.ended is None and not self._dead:
            request = {"op": "kill", "key": key, "why": "nobody knows it", "now": True}
            with contextlib.suppress(SandboxUnavailable):  # it died, and the job with it
                await self._channel.send(request, ())
        else:
            await self.forget(key)

    async def forget(self, key: str) -> None:
        """The end of this job was stored; the launcher need not keep it."""
        if not self._dead:
            with contextlib.suppress(SandboxUnavailable):  # it died: it keeps nothing
                await self._channel.send({"op": "forget", "key": key}, ())

    def _refuse(self, plan: SandboxPlan) -> None:
        if self._dead:
            raise SandboxUnavailable(self._dead)
        wrong = plan_problem(plan)
        if wrong is not None:
            raise CommandRefused(wrong)
        if plan.key in self._running or plan.key in self._found:
            wrong = f"key {plan.key!r} is already running"
        if wrong is None and not set(plan.devices) <= set(self.settings.devices):
            wrong = f"devices {plan.devices} are not all in the settings' devices"
        if wrong is None and not self.enforcement.has_image(plan.image):
            raise SandboxUnavailable(f"the launcher that runs has no image in {plan.image}")
        if wrong is None and plan.network == "host" and not self.settings.allow_host_network:
            wrong = "network='host' needs the setting allow_host_network"
        if wrong is not None:
            raise PlanRefused(wrong)
        lacking = unheld(plan, self.enforcement.missing)
        if lacking:
            raise LimitNotEnforced(lacking)

    async def _run(
        self,
        plan: SandboxPlan,
        running: _Running,
        stdin: bytes,
        on_output: OnOutput | None,
        inputs: tuple[int, ...],
        on_work: OnWork | None,
    ) -> SandboxOutcome:
        pumps: list[OutputPump] = []
        reads: list[int] = []  # the pumps'
        writes: list[int] = []
        theirs = inputs
        try:
            caps = (plan.stdout_bytes_max, plan.stderr_bytes_max)
            for name, cap in zip(_STREAMS, caps, strict=True):
                read, write = os.pipe()
                writes.append(write)
                reads.append(read)
                pumps.append(OutputPump(read, cap, _sink(on_output, name)))
            stdin_read, feed = input_of(stdin)
            theirs = (stdin_read, *feed, *inputs)
            fds = (stdin_read, *writes, *reads, *feed, *inputs)
            await self._channel.send({"op": "run", **plan_message(plan)}, fds)
        except BaseException:
            for pump in pumps:
                pump.close()
            raise
        finally:
            _close((*writes, *theirs))
        return await self._to_the_end(plan, running, pumps, on_work)

    async def _to_the_end(
        self,
        plan: SandboxPlan,
        running: _Running,
        pumps: list[OutputPump],
        on_work: OnWork | None,
    ) -> SandboxOutcome:
        watch = None
        if plan.idle_ms:
            watch = asyncio.get_running_loop().create_task(self._tell_activity(plan, pumps))
        try:
            ended = await self._until_ended(plan.key, running)
            for pump in pumps:
                pump.hurry()
            await asyncio.gather(*(pump.done for pump in pumps))
            if on_work is not None and ended.work_fd >= 0:
                await on_work(ended.work_fd)
        finally:
            _close_work(running)
            if watch is not None:
                watch.cancel()
            for pump in pumps:
                pump.close()
        return _outcome(ended, pumps)

    async def _tell_activity(self, plan: SandboxPlan, pumps: list[OutputPump]) -> None:
        """Output keeps a job from being idle, and only we see all of it."""
        told = 0
        while not self._dead:
            await asyncio.sleep(max(plan.idle_ms / 1000 / _ACTIVITY_LOOKS, _ACTIVITY_S_MIN))
            seen = sum(pump.bytes_seen for pump in pumps)
            if seen != told:
                with contextlib.suppress(SandboxUnavailable):  # it died, and the job with it
                    await self._channel.send({"op": "active", "key": plan.key}, ())
                told = seen

    async def _until_ended(self, key: str, running: _Running) -> _Ended:
        try:
            return await asyncio.shield(running.ended)
        except asyncio.CancelledError:
            if not self._dead:
                request = {"op": "kill", "key": key, "why": "cancelled", "now": True}
                await self._channel.send(request, ())
            await running.ended
            raise

    async def kill(self, key: str, why: str) -> bool:
        """SIGTERM, the plan's grace, SIGKILL; the run's outcome is ``killed``. False if unknown."""
        if key not in self._running or self._dead:
            return False
        await self._channel.send({"op": "kill", "key": key, "why": why, "now": False}, ())
        return True

    async def extend_lease(self, key: str, until_ms: int) -> None:
        """The job may run until then (CLOCK_BOOTTIME)."""
        if not self._dead:
            with contextlib.suppress(SandboxUnavailable):  # it died, and the job with it
                await self._channel.send({"op": "lease", "key": key, "until_ms": until_ms}, ())

    async def fence(self, key: str, why: str) -> None:
        """The job's lease is over: it dies now, if need be with the launcher and all its jobs."""
        running = self._running.get(key)
        if running is None or self._dead:
            return
        request = {"op": "kill", "key": key, "why": why, "now": True, "cause": "lease_over"}
        try:
            async with asyncio.timeout(FENCE_TIMEOUT_S):
                await self._channel.send(request, ())
                await asyncio.shield(running.ended)
        except TimeoutError:
            self._process.kill()
        except SandboxUnavailable:
            return  # it died, and the job with it

    # --- what the launcher says ---------------------------------------------------------------
    def _on_message_bytes(self, data: bytes, fds: list[int]) -> None:
        if not data:
            self._on_dead("the launcher died; start a new sandbox (it sweeps first)")
        elif not self._hello.done():
            self._hello.set_result(data)
        else:
            self._on_message(msgspec.json.decode(data, type=Message), fds)

    def _on_message(self, message: Message, fds: list[int]) -> None:
        key = message.key
        if message.op == "have":
            self._found[key] = _Found(message.started, fds)
            return
        if message.op == "had" and not self._listed.done():
            self._listed.set_result(None)
        if len(fds) < len(message.fds) and message.cause == "exited":  # maybe with success
            lost = f"no descriptor was left in the agent for the job's {', '.join(message.fds)}"
            message = msgspec.structs.replace(
                message, cause="sandbox_failed", exit_code=None, signal=None, detail=lost, fds=()
            )
        all_there = len(fds) == len(message.fds)
        given = dict(zip(message.fds, fds, strict=True)) if all_there else {}
        result = read_result(given["result"]) if "result" in given else None
        work_fd = given.get("work", -1)
        _close(fd for fd in fds if fd != work_fd)
        running, found = self._running.get(key), self._found.get(key)
        if message.op == "started":
            if running is not None and running.on_started is not None:
                running.on_started()
            if found is not None:
                found.started = True
        if message.op == "ended":
            ended = _Ended(message, result, work_fd)
            if running is not None and not running.ended.done():
                running.ended.set_result(ended)
                return
            if found is not None:
                found.ended = ended
                return
            _close([work_fd] if work_fd >= 0 else [])
            if running is None:
                forgetting = self.forget(key)  # a discarded one
                asyncio.get_running_loop().create_task(forgetting)

    def _on_dead(self, why: str) -> None:
        if self._dead:
            return
        self._dead = why
        self.died.set()
        self._channel.deaf()
        if not self._hello.done():
            self._hello.set_result(msgspec.json.encode({"op": "died"}))
        if not self._listed.done():
            self._listed.set_result(None)
        for running in self._running.values():
            if not running.ended.done():
                running.ended.set_result(_died(why))

    @property
    def launcher_stderr(self) -> str:
        """The launcher's last words, for error reports."""
        return self._process.stderr_tail()


def build_of(settings: SandboxSettings) -> str:
    """Names what a launcher is made of: its code, its settings, its system call filter."""
    found = hashlib.sha256(msgspec.json.encode(settings))
    found.update(seccomp.encode(seccomp.build_filter(platform.machine())))
    for path in sorted(_LAUNCHER_CODE.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _hiding(settings: SandboxSettings, home: Path) -> SandboxSettings:
    """Jobs that run as our own user could call the launcher where they see its socket."""
    hidden = (*settings.hidden_paths, os.path.realpath(home))
    return msgspec.structs.replace(settings, hidden_paths=hidden)


def _died(why: str) -> _Ended:
    return _Ended(Message(op="ended", cause="sandbox_failed", detail=why), None)


def _sink(on_output: OnOutput | None, stream: Stream) -> Callable[[bytes], None] | None:
    return None if on_output is None else lambda data: on_output(stream, data)


def _close_work(running: _Running) -> None:
    """The work directory of a job that has ended, whose memory goes with it."""
    if running.ended.done() and not running.ended.cancelled():
        _close([fd for fd in [running.ended.result().work_fd] if fd >= 0])


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _outcome(ended: _Ended, pumps: list[OutputPump]) -> SandboxOutcome:
    fields = msgspec.to_builtins(ended.message)
    del fields["op"], fields["key"], fields["started"], fields["fds"]
    out, err = pumps if len(pumps) == len(_STREAMS) else (None, None)
    fields |= {
        "stdout_bytes": out.bytes_seen if out else 0,
        "stderr_bytes": err.bytes_seen if err else 0,
        "output_truncated": out is None or any(pump.truncated for pump in pumps),
    }
    outcome = msgspec.convert(fields, SandboxOutcome, strict=True)
    return msgspec.structs.replace(outcome, result=ended.result)
