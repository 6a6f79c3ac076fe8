"""The native sandbox as the agent uses it: start once, run many jobs, close.

This side is asyncio and holds the pipes; the launcher process holds the privileges and the jobs.
They share one SOCK_SEQPACKET socketpair. No job is ever run here, and none without its limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from node_agent.sandbox import seccomp
from node_agent.sandbox.plan import (
    Enforcement,
    Limit,
    LimitNotEnforced,
    PlanRefused,
    SandboxOutcome,
    SandboxPlan,
    SandboxUnavailable,
    plan_problem,
)
from node_agent.sandbox.settings import SandboxSettings, problem
from node_agent.sandbox.streams import InputPump, OutputPump

Stream = Literal["stdout", "stderr"]
OnOutput = Callable[[Stream, bytes], None]

# One record of the launcher's protocol (node_agent.launcher.main.MESSAGE_BYTES_MAX).
MESSAGE_BYTES_MAX = 1 << 18
# How long the launcher may take to kill and remove everything before it is killed itself.
CLOSE_TIMEOUT_S = 15.0
_STDERR_TAIL_BYTES = 4096
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from node_agent.launcher.main import main; sys.exit(main(int(sys.argv[2])))"
)
_ENV_DEFAULTS = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/work",
    "TMPDIR": "/tmp",  # the job's own tmpfs
    "LANG": "C.UTF-8",
}
RESULT_PATH = "/work/result"
_CODE_ROOT = str(Path(__file__).resolve().parents[2])
_CGROUP_ADVICE = (
    " (run as root, or under a systemd unit with Delegate=yes and DelegateSubgroup=agent)"
)


class Hello(msgspec.Struct, frozen=True):
    """The launcher's first message: what it could set up, and what its self-test found."""

    mode: Literal["root", "userns"]
    cgroup: Literal["v2", "hybrid", "v1", "none"]
    holds: list[str]
    cgroup_problems: list[str]
    probe_cause: str
    probe_detail: str
    loose: int
    loose_bits: dict[str, int]
    landlock_abi: int
    device_filter: Literal["ebpf", "v1", "none"]
    notes: list[str]


class _Message(msgspec.Struct, frozen=True):
    op: str
    key: str = ""
    cause: str = ""
    exit_code: int | None = None
    signal: int | None = None
    detail: str = ""
    wall_ms: int = 0
    cpu_ms: int = 0
    memory_peak_bytes: int = 0
    pids_peak: int | None = None
    result_refused: str = ""


class _Ended(msgspec.Struct, frozen=True):
    message: _Message
    result: bytes | None


class _Running:
    """One job between ``run`` and its outcome."""

    def __init__(self, plan: SandboxPlan, on_started: Callable[[], None] | None) -> None:
        self.plan, self.on_started = plan, on_started
        self.ended: asyncio.Future[_Ended] = asyncio.get_running_loop().create_future()


def enforcement(hello: Hello) -> Enforcement:
    """What is held, from what the launcher set up and its self-test confirmed."""
    missing: dict[Limit, str] = {}
    no_cgroup = "; ".join(hello.cgroup_problems) or "no such cgroup controller here"
    no_cgroup += _CGROUP_ADVICE
    for limit in (Limit.MEMORY, Limit.CPU):
        if limit.value not in hello.holds:
            missing[limit] = no_cgroup
    for name, bit in hello.loose_bits.items():
        if hello.loose & bit:
            missing[Limit(name)] = f"the self-test found it not held {hello.probe_detail}".strip()
    if Limit.PIDS in missing and "pids" not in hello.holds:
        missing[Limit.PIDS] = f"RLIMIT_NPROC does not hold in a user namespace, and {no_cgroup}"
    return Enforcement(
        enforced=frozenset(Limit) - frozenset(missing),
        missing=missing,
        mode=hello.mode,
        cgroup=hello.cgroup,
        kernel=platform.release(),
        landlock_abi=hello.landlock_abi,
        seccomp=Limit.SECCOMP not in missing,
        device_filter=hello.device_filter,
        notes=tuple(hello.notes),
    )


class NativeSandbox:
    """Runs jobs in namespaces, cgroups and a seccomp filter through one launcher process."""

    def __init__(
        self,
        settings: SandboxSettings,
        channel: socket.socket,
        process: asyncio.subprocess.Process,
    ) -> None:
        self.settings = settings
        self._channel, self._process = channel, process
        self._running: dict[str, _Running] = {}
        self._send_lock = asyncio.Lock()
        self._hello: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._dead = ""
        self._stderr = b""
        self._stderr_task = asyncio.create_task(self._read_stderr())
        self.enforcement: Enforcement
        self.launcher_pid = process.pid

    # --- life ---------------------------------------------------------------------------------
    @classmethod
    async def start(cls, settings: SandboxSettings) -> NativeSandbox:
        """Spawn the launcher, sweep what a dead one left, probe. Raises SandboxUnavailable."""
        wrong = problem(settings)
        if wrong is not None:
            raise SandboxUnavailable(f"sandbox settings: {wrong}")
        machine = platform.machine()
        if machine not in seccomp.MACHINES:
            raise SandboxUnavailable(
                f"no seccomp filter for machine {machine!r}; supported: {seccomp.MACHINES}"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = await _spawn(settings, theirs)
        except OSError as error:
            ours.close()
            raise SandboxUnavailable(f"the launcher did not start: {error}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        sandbox = cls(settings, ours, process)
        asyncio.get_running_loop().add_reader(ours.fileno(), sandbox._on_readable)
        try:
            await sandbox._handshake(machine)
        except BaseException:
            await sandbox._abandon()
            raise
        return sandbox

    async def _handshake(self, machine: str) -> None:
        probe = SandboxPlan(key="probe", argv=("probe",), pids_max=6, wall_ms=10_000, grace_ms=0)
        init = {
            **msgspec.to_builtins(self.settings),
            "seccomp": seccomp.encode(seccomp.build_filter(machine)).hex(),
            "probe": {**_plan_message(probe), "probe": True},
        }
        await self._send(init, ())
        try:
            async with asyncio.timeout(self.settings.start_timeout_s):
                data = await self._hello
        except TimeoutError:
            raise SandboxUnavailable(
                f"the launcher did not answer within {self.settings.start_timeout_s} s"
            ) from None
        answer: dict[str, Any] = msgspec.json.decode(data)
        if answer.get("op") != "hello":
            raise SandboxUnavailable(_unavailable_text(answer))
        hello = msgspec.convert(answer, Hello, strict=True)
        if hello.probe_cause != "exited" or hello.loose < 0:
            raise SandboxUnavailable(
                f"the sandbox's self-test failed ({hello.probe_cause}: {hello.probe_detail}); "
                "no job can be run safely here"
            )
        self.enforcement = enforcement(hello)

    async def close(self) -> None:
        """Kill every job, remove everything, wait for the launcher to end."""
        if not self._dead:
            with contextlib.suppress(SandboxUnavailable):  # it may die meanwhile
                await self._send({"op": "close"}, ())
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._on_dead("the sandbox was closed")
        await self._abandon()

    async def _abandon(self) -> None:
        self._on_dead("the sandbox was closed")
        self._channel.close()
        if self._process.returncode is None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._process.wait()  # it ends by itself at end of file
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._stderr_task

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
    ) -> SandboxOutcome:
        """Run one job to its end.

        ``on_output`` gets at most the plan's caps; ``on_started`` is called once exec succeeded.
        Raises PlanRefused, LimitNotEnforced or SandboxUnavailable before anything is launched.
        Cancelling kills the job at once and waits for its end.
        """
        self._refuse(plan)
        running = _Running(plan, on_started)
        self._running[plan.key] = running
        try:
            return await self._run(plan, running, stdin, on_output)
        finally:
            self._running.pop(plan.key, None)

    def _refuse(self, plan: SandboxPlan) -> None:
        if self._dead:
            raise SandboxUnavailable(self._dead)
        wrong = plan_problem(plan)
        if wrong is None and plan.key in self._running:
            wrong = f"key {plan.key!r} is already running"
        if wrong is None and not set(plan.devices) <= set(self.settings.devices):
            wrong = f"devices {plan.devices} are not all in the settings' devices"
        if wrong is None and plan.network == "host" and not self.settings.allow_host_network:
            wrong = "network='host' needs the setting allow_host_network"
        if wrong is not None:
            raise PlanRefused(wrong)
        missing = self.enforcement.missing
        unheld = {limit: missing[limit] for limit in sorted(plan.require) if limit in missing}
        if unheld:
            raise LimitNotEnforced(unheld)

    async def _run(
        self, plan: SandboxPlan, running: _Running, stdin: bytes, on_output: OnOutput | None
    ) -> SandboxOutcome:
        pipes = [os.pipe() for _ in range(3)]
        (stdin_read, stdin_write), (stdout_read, stdout_write), (stderr_read, stderr_write) = pipes
        theirs = (stdin_read, stdout_write, stderr_write)
        out = OutputPump(stdout_read, plan.stdout_bytes_max, _sink(on_output, "stdout"))
        err = OutputPump(stderr_read, plan.stderr_bytes_max, _sink(on_output, "stderr"))
        feed = InputPump(stdin_write, stdin)
        try:
            try:
                await self._send({"op": "run", **_plan_message(plan)}, theirs)
            finally:
                _close(theirs)
            ended = await self._until_ended(running)
            await asyncio.gather(out.done, err.done)
        finally:
            for pump in (out, err, feed):
                pump.close()
        return _outcome(ended, out, err)

    async def _until_ended(self, running: _Running) -> _Ended:
        try:
            return await asyncio.shield(running.ended)
        except asyncio.CancelledError:
            if not self._dead:
                request = {"op": "kill", "key": running.plan.key, "why": "cancelled", "now": True}
                await self._send(request, ())
            await running.ended
            raise

    async def kill(self, key: str, why: str) -> bool:
        """SIGTERM, the plan's grace, SIGKILL; the run's outcome is ``killed``. False if unknown."""
        if key not in self._running or self._dead:
            return False
        await self._send({"op": "kill", "key": key, "why": why, "now": False}, ())
        return True

    # --- the launcher -------------------------------------------------------------------------
    async def _send(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        try:
            data = msgspec.json.encode(message)
        except UnicodeEncodeError as error:
            raise PlanRefused(f"argv and env must be valid UTF-8: {error}") from error
        if len(data) > MESSAGE_BYTES_MAX:
            raise PlanRefused(f"the plan takes {len(data)} bytes, at most {MESSAGE_BYTES_MAX}")
        async with self._send_lock:
            while True:
                try:
                    socket.send_fds(self._channel, [data], list(fds))
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    if error.errno == errno.EMSGSIZE:
                        raise PlanRefused(f"the plan takes {len(data)} bytes: too many") from error
                    raise SandboxUnavailable(f"the launcher is gone: {error}") from error
                else:
                    return

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self._channel.fileno(), _wake, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self._channel.fileno())

    def _on_readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES_MAX, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._on_dead("the launcher died; start a new sandbox (it sweeps first)")
        elif not self._hello.done():
            self._hello.set_result(data)
        else:
            self._on_message(msgspec.json.decode(data, type=_Message), fds)

    def _on_message(self, message: _Message, fds: list[int]) -> None:
        running = self._running.get(message.key)
        result = None
        if fds and running is not None:
            result = _read_result(fds[0], running.plan.result_bytes_max)
        _close(fds)
        if running is None:
            return
        if message.op == "started" and running.on_started is not None:
            running.on_started()
        if message.op == "ended" and not running.ended.done():
            running.ended.set_result(_Ended(message, result))

    def _on_dead(self, why: str) -> None:
        if self._dead:
            return
        self._dead = why
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        if not self._hello.done():
            self._hello.set_result(msgspec.json.encode({"op": "died"}))
        for running in self._running.values():
            if not running.ended.done():
                message = _Message(op="ended", cause="sandbox_failed", detail=why)
                running.ended.set_result(_Ended(message, None))

    async def _read_stderr(self) -> None:
        stream = self._process.stderr
        while stream is not None and (data := await stream.read(_STDERR_TAIL_BYTES)):
            self._stderr = (self._stderr + data)[-_STDERR_TAIL_BYTES:]

    @property
    def launcher_stderr(self) -> str:
        """The launcher's last words, for error reports."""
        return self._stderr.decode("utf-8", "replace")


async def _spawn(settings: SandboxSettings, theirs: socket.socket) -> asyncio.subprocess.Process:
    python = settings.python or getattr(sys, "_base_executable", sys.executable)
    return await asyncio.create_subprocess_exec(
        python,
        *("-I", "-S", "-c", _BOOT, _CODE_ROOT, str(theirs.fileno())),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=(theirs.fileno(),),
        env={"LC_ALL": "C.UTF-8", "OUTRIDER_INSTANCE": settings.instance},
        start_new_session=True,
    )


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _unavailable_text(answer: dict[str, Any]) -> str:
    if answer.get("op") == "died":
        return "the launcher ended while starting; run it by hand to see why"
    text = f"sandbox set-up failed at step {answer.get('step')!r}: {answer.get('detail')}"
    if answer.get("step") == "user namespace":
        text += (
            " (run as root, or allow user namespaces: sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
        )
    return text


def _plan_message(plan: SandboxPlan) -> dict[str, Any]:
    message: dict[str, Any] = msgspec.to_builtins(plan)
    message["env"] = {**_ENV_DEFAULTS, **plan.env, "OUTRIDER_RESULT": RESULT_PATH}
    del message["require"]
    return message


def _sink(on_output: OnOutput | None, stream: Stream) -> Callable[[bytes], None] | None:
    return None if on_output is None else lambda data: on_output(stream, data)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _read_result(fd: int, bytes_max: int) -> bytes:
    """The launcher has checked that it is a regular file within the cap and nobody writes it."""
    parts = []
    room = bytes_max
    while room > 0 and (data := os.read(fd, room)):
        parts.append(data)
        room -= len(data)
    return b"".join(parts)


def _outcome(ended: _Ended, out: OutputPump, err: OutputPump) -> SandboxOutcome:
    fields = msgspec.to_builtins(ended.message)
    del fields["op"], fields["key"]
    fields |= {
        "stdout_bytes": out.bytes_seen,
        "stderr_bytes": err.bytes_seen,
        "output_truncated": out.truncated or err.truncated,
    }
    outcome = msgspec.convert(fields, SandboxOutcome, strict=True)
    return msgspec.structs.replace(outcome, result=ended.result)
