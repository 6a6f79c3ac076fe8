"""The kinds of faults: what each does to its targets, and how it is healed.

`heal` is carried out even after `begin` failed half-way, and may be repeated.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

from chaos.faults import clock
from chaos.faults.network import (
    BROKER,
    INTERFACE,
    Network,
    both_ways,
    netem_unavailable,
    tc,
)
from chaos.faults.wire import Weather
from chaos.faults.world import DISK_BYTES, FILLER, World
from chaos.scenario import FaultSpec, percent, signed_ms
from idl.errors import ConfigError, OutriderError, PlatformFaultError
from idl.units import parse_ms
from outrider.local.process import identity_of, send_signal, wait_gone

_T = TypeVar("_T")
BROKER_GONE_S: Final = 5.0
JUMP: Final = "30s"
DELAY: Final = "50ms"


def _each(act: Callable[[_T], object], things: Iterable[_T]) -> None:
    """Acts on every thing, also after it failed on one; then raises the first failure."""
    failures: list[Exception] = []
    for thing in things:
        try:
            act(thing)
        except (OutriderError, OSError) as error:
            failures.append(error)
    if failures:
        raise failures[0]


class Fault(Protocol):
    """One fault on its targets. `means`: by what it is done, where there are several ways."""

    means: str

    def begin(self) -> str:
        """Does it; returns details for people. Raises OutriderError or OSError where it cannot be
        done."""

    def heal(self) -> str | None:
        """Undoes it; may return what was counted, for people."""


class _Base:
    def __init__(
        self, world: World, spec: FaultSpec, targets: tuple[str, ...], dice: int = 0
    ) -> None:
        self.world = world
        self.spec = spec
        self.targets = targets
        self.dice = dice
        self.means = ""

    @property
    def net(self) -> Network:
        if self.world.network is None:
            raise ConfigError(f"{self.spec.fault} needs network: namespaces")
        return self.world.network


class Killed(_Base):
    """SIGKILL; healed by a restart with the same arguments."""

    number = signal.SIGKILL

    def begin(self) -> str:
        for name in self.targets:
            self.world.signal(name, self.number)
        return self.number.name

    def heal(self) -> None:
        _each(self.world.restart, self.targets)


class Stopped(Killed):
    """SIGTERM, as a redeployment does; healed by a restart."""

    number = signal.SIGTERM


class Paused(_Base):
    """SIGSTOP: alive to the kernel, deaf to everybody; healed by SIGCONT."""

    def begin(self) -> str:
        for name in self.targets:
            self.world.signal(name, signal.SIGSTOP)
        return "SIGSTOP"

    def heal(self) -> None:
        _each(self._wake, self.targets)

    def _wake(self, name: str) -> None:
        with contextlib.suppress(ConfigError):  # it is gone: nothing to wake
            self.world.signal(name, signal.SIGCONT)


class Partitioned(_Base):
    """The targets are cut off from others, one way or both."""

    def _pairs(self) -> list[tuple[str, str]]:
        world, far = self.world, self.spec.cut_off_from
        others = {
            "all": (*world.coordinators, *world.agents, BROKER),
            "coordinators": world.coordinators,
            "agents": world.agents,
            "broker": (BROKER,),
        }[far]
        outside = [name for name in others if name not in self.targets]
        return both_ways(self.targets, outside, self.spec.direction)

    def begin(self) -> str:
        for source, target in self._pairs():
            self.net.cut(source, target)
        return f"from {self.spec.cut_off_from}, {self.spec.direction}"

    def heal(self) -> None:
        _each(lambda pair: self.net.join(*pair), self._pairs())


class BadWire(_Base):
    """Delay, loss, duplication of what the targets send: by tc-netem(8), else by a wire of ours."""

    @property
    def weather(self) -> Weather:
        """What the wire does; a delay has a quarter of itself as jitter."""
        if self.spec.fault == "delay":
            delay_ms = parse_ms(self.spec.amount or DELAY)
            return Weather(delay_ms=delay_ms, jitter_ms=delay_ms // 4, seed=self.dice)
        share = percent(self.spec.amount) / 100
        if self.spec.fault == "loss":
            return Weather(loss=share, seed=self.dice)
        return Weather(duplication=share, seed=self.dice)

    @property
    def netem(self) -> tuple[str, ...]:
        """The same for tc-netem(8)."""
        weather = self.weather
        if weather.delay_ms:
            return ("delay", f"{weather.delay_ms:g}ms", f"{weather.jitter_ms:g}ms")
        if weather.loss:
            return ("loss", f"{weather.loss:.2%}")
        return ("duplicate", f"{weather.duplication:.2%}")

    def begin(self) -> str:
        self.means = "wire" if netem_unavailable() else "netem"
        for name in self.targets:
            if self.means == "netem":
                tc(self.net.namespace(name), "replace", INTERFACE, "netem", *self.netem)
            else:
                self.net.splice(name, self.weather)
        return f"{' '.join(self.netem)}, by {self.means}"

    def heal(self) -> str:
        counted: list[str] = []
        _each(lambda name: self._mend(name, counted), self.targets)
        return "; ".join(counted)

    def _mend(self, name: str, counted: list[str]) -> None:
        if self.means == "wire":
            counted.append(str(self.net.unsplice(name)))
        else:
            with contextlib.suppress(PlatformFaultError):  # there was none
                tc(self.net.namespace(name), "del", INTERFACE)


class BrokerKilled(_Base):
    """SIGKILL of every broker node; healed by a restart on its data."""

    def begin(self) -> str:
        broker = self.world.broker()
        if not broker.durable:
            raise ConfigError("the embedded broker would lose every record")
        for identity in filter(None, map(identity_of, broker.pids)):
            send_signal(identity, signal.SIGKILL)
            wait_gone(identity, BROKER_GONE_S)
        return "SIGKILL"

    def heal(self) -> None:
        broker = self.world.broker()
        _each(broker.start_node, range(broker.nodes))


class ClockJumped(_Base):
    """The wall clock of the targets is suddenly off; healed by jumping back."""

    def begin(self) -> str:
        amount = self.spec.amount or JUMP
        for name in self.targets:
            clock.write_offset(self.world.clock_file(name), signed_ms(amount))
        return f"by {amount}"

    def heal(self) -> None:
        _each(lambda name: clock.write_offset(self.world.clock_file(name), 0), self.targets)


class DiskFull(_Base):
    """The disk of the state directory has no byte left; healed by removing the filler."""

    def begin(self) -> str:
        disk = self.world.disk
        if disk is None:
            raise ConfigError("there is no small disk to fill")
        descriptor = os.open(disk / FILLER, os.O_WRONLY | os.O_CREAT)
        try:
            with contextlib.suppress(OSError):  # ENOSPC is what we want
                while os.write(descriptor, bytes(DISK_BYTES // 8)):
                    pass
        finally:
            os.close(descriptor)
        return f"{os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize} bytes free"

    def heal(self) -> None:
        if self.world.disk is not None:
            (self.world.disk / FILLER).unlink(missing_ok=True)


KINDS: Final[dict[str, Callable[[World, FaultSpec, tuple[str, ...], int], Fault]]] = {
    "kill": Killed, "stop": Stopped, "pause": Paused, "partition": Partitioned,
    "delay": BadWire, "loss": BadWire, "duplication": BadWire, "broker_kill": BrokerKilled,
    "clock_jump": ClockJumped, "disk_full": DiskFull,
}  # fmt: skip
