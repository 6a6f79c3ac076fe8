"""Scenarios: a YAML file that says which cluster, which load, which faults, and what is judged.

Durations are written as people write them (`500ms`, `4s`, `1m`). `docs/chaos.md` has the format.
"""

from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import yaml

from idl.errors import ConfigError, OutriderError
from idl.units import parse_ms

JobKind = Literal[
    "quick", "work", "failing", "flaky", "timeout", "cancelled", "large", "poisoned", "duplicate"
]
JOB_KINDS: Final[tuple[JobKind, ...]] = get_args(JobKind)
FaultKind = Literal[
    "kill", "stop", "pause", "partition", "delay", "loss", "duplication", "broker_kill",
    "clock_jump", "disk_full",
]  # fmt: skip
Target = Literal[
    "leader", "standby", "coordinator", "agent", "minority", "majority", "coordinators", "agents",
    "broker", "any",
]  # fmt: skip
PROCESS_FAULTS: Final = frozenset({"kill", "stop", "pause"})
NETWORK_FAULTS: Final = frozenset({"partition", "delay", "loss", "duplication"})
COORDINATORS_MAX: Final = 9
AGENTS_MAX: Final = 64
RATE_MAX: Final = 1_000.0
"""Jobs a second: beyond it the one generating process is what is measured."""


class ClusterShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is started. `namespaces`: each process in a network namespace of its own (root)."""

    coordinators: int = 3
    agents: int = 2
    kafka: Literal["embedded", "apache"] = "embedded"
    network: Literal["loopback", "namespaces"] = "loopback"
    node_lost: str = "3s"
    """Silence after which a node is declared lost; short, so that a run sees it often."""
    overcommit: bool = False


class Generator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The load: `rate` submissions a second (Poisson), mixed by weight."""

    rate: float = 4.0
    mix: dict[JobKind, float] = msgspec.field(default_factory=lambda: {JOB_KINDS[0]: 1.0})
    work: tuple[str, str] = ("50ms", "1s")
    """Shortest and longest `work` job."""
    large: tuple[int, int] = (80_000, 400_000)
    """Payload bytes of a `large` job, from and to; above 64 KiB it travels by claim check."""
    cpu: str = "100m"
    memory: str = "32Mi"


class FaultSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One recurring fault: every `every` ± `jitter` (share of it), healed after `lasts`.

    `direction` is of a partition: both, or only what the target sends (`out`) or receives (`in`).
    `cut_off_from`: whom a partition separates the target from.
    `amount`: delay or clock jump (a duration, jumps may be negative), loss or duplication (%).
    """

    fault: FaultKind
    target: Target = "any"
    every: str = "10s"
    jitter: float = 0.3
    lasts: str = "2s"
    first: str = ""
    direction: Literal["both", "out", "in"] = "both"
    cut_off_from: Literal["all", "coordinators", "agents", "broker"] = "all"
    amount: str = ""


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module. `settle`: how long every job may take to end after the last healing."""

    name: str = ""
    about: str
    cluster: ClusterShape = ClusterShape()
    generator: Generator = Generator()
    nemesis: tuple[FaultSpec, ...] = ()
    settle: str = "60s"
    checkers: tuple[str, ...] = ()
    """Names of `chaos.checkers`; empty: all of them."""


def signed_ms(text: str) -> int:
    """`"-30s"` → -30,000. Raises ConfigError."""
    sign = -1 if text.startswith("-") else 1
    return sign * parse_ms(text.removeprefix("-"))


def percent(text: str) -> float:
    """`"20%"` → 20.0. Raises ConfigError."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise ConfigError(f"{text!r} is not a share; write it like 20%") from None
    if not 0 <= value <= 100:
        raise ConfigError(f"{text!r} is not a share; it is from 0% to 100%")
    return value


def _check_fault(spec: FaultSpec, shape: ClusterShape) -> None:
    if parse_ms(spec.every) <= 0:
        raise ConfigError(f"{spec.fault}: `every` must be longer than nothing, e.g. 10s")
    if not 0 <= spec.jitter <= 1:
        raise ConfigError(f"{spec.fault}: jitter is a share of `every`, from 0 to 1")
    parse_ms(spec.lasts)
    if spec.first:
        parse_ms(spec.first)
    if spec.fault == "broker_kill" and shape.kafka == "embedded":
        raise ConfigError(
            "broker_kill needs `kafka: apache`: the embedded broker keeps everything in memory, "
            "killing it loses every record by design"
        )
    if spec.fault == "broker_kill" and spec.target != "broker":
        raise ConfigError("broker_kill hits the broker: write `target: broker`")
    if spec.fault in NETWORK_FAULTS and shape.network != "namespaces":
        raise ConfigError(f"{spec.fault} needs `network: namespaces`")
    if spec.fault in PROCESS_FAULTS and spec.target == "broker":
        raise ConfigError(f"{spec.fault} of the broker is the fault broker_kill")
    if spec.fault in ("delay", "clock_jump"):
        signed_ms(spec.amount or "0s")
    if spec.fault in ("loss", "duplication"):
        percent(spec.amount)


def check(scenario: Scenario, checkers: frozenset[str]) -> None:
    """Raises ConfigError with the first thing wrong."""
    shape, load = scenario.cluster, scenario.generator
    if not 1 <= shape.coordinators <= COORDINATORS_MAX or not 1 <= shape.agents <= AGENTS_MAX:
        raise ConfigError(
            f"a cluster has 1 to {COORDINATORS_MAX} coordinators and 1 to {AGENTS_MAX} agents"
        )
    if shape.kafka == "apache" and shape.network == "namespaces":
        raise ConfigError(
            "kafka: apache is not started in namespaces here; use embedded, or network: loopback"
        )
    if not 0 < load.rate <= RATE_MAX:
        raise ConfigError(f"rate is {load.rate:g} jobs a second; from above 0 to {RATE_MAX:g}")
    if (
        not load.mix
        or any(weight < 0 for weight in load.mix.values())
        or not sum(load.mix.values())
    ):
        raise ConfigError("mix needs at least one kind of job with a weight above 0")
    parse_ms(load.work[0]), parse_ms(load.work[1]), parse_ms(scenario.settle)
    parse_ms(shape.node_lost)
    for spec in scenario.nemesis:
        _check_fault(spec, shape)
    for name in scenario.checkers:
        if name not in checkers:
            known = ", ".join(sorted(checkers))
            raise ConfigError(f"checker {name!r} is not known; there are {known}")


def parse_scenario(text: str, name: str, checkers: frozenset[str] = frozenset()) -> Scenario:
    """A scenario from YAML, checked. Raises ConfigError that names it and what is wrong."""
    try:
        found: Any = yaml.safe_load(text)
        scenario = msgspec.convert(found, Scenario, strict=False)
        scenario = msgspec.structs.replace(scenario, name=scenario.name or name)
        check(scenario, checkers)
    except (yaml.YAMLError, msgspec.ValidationError, OutriderError) as error:
        raise ConfigError(f"scenario {name}: {error}") from error
    return scenario


def built_in() -> dict[str, str]:
    """The scenarios that come with the harness: name → YAML."""
    folder = resources.files("chaos").joinpath("scenarios")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text()
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    }


def load_scenario(where: str, checkers: frozenset[str] = frozenset()) -> Scenario:
    """A file, or the name of one that comes with the harness. Raises ConfigError."""
    name = Path(where).stem if _is_file(where) else where
    return parse_scenario(scenario_text(where), name, checkers)


def scenario_text(where: str) -> str:
    """The YAML of the same. Raises ConfigError."""
    if _is_file(where):
        try:
            return Path(where).read_bytes().decode()
        except OSError as error:
            raise ConfigError(f"cannot read scenario {where}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"cannot read scenario {where}: it is not UTF-8 text") from error
    known = built_in()
    if where not in known:
        raise ConfigError(f"no scenario {where!r}; there are {', '.join(known)}, or give a file")
    return known[where]


def _is_file(where: str) -> bool:
    path = Path(where)
    return path.suffix in (".yaml", ".yml") or path.exists()
