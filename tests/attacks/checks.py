# ruff: noqa: E501 - what differs is said in one line
"""What the outside sees of an attack, what must be true of it, and where a backend differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from node_agent.sandbox.plan import SandboxOutcome


@dataclass(frozen=True)
class Seen:
    """What the outside saw of one attack."""

    outcome: SandboxOutcome
    stdout: str
    delivered_bytes: int

    @property
    def words(self) -> list[str]:
        return self.stdout.split()


Check = Callable[[Seen], bool]


@dataclass(frozen=True)
class Difference:
    """Another result than native's is right on these backends; ``why`` says so to people."""

    backends: frozenset[str]
    check: Check
    why: str


def all_words(*allowed: str) -> Check:
    """At least one try, and every one ended in one of ``allowed``."""
    return lambda seen: bool(seen.words) and set(seen.words) <= set(allowed)


def exactly(text: str) -> Check:
    return lambda seen: seen.stdout.split() == text.split()


def ended(cause: str, **fields: Any) -> Check:
    return lambda seen: (
        seen.outcome.cause == cause
        and all(getattr(seen.outcome, name) == value for name, value in fields.items())
    )


OCI_NOSUID = Difference(
    frozenset({"crun", "runc"}),
    lambda seen: (
        seen.words[-2:] == ["True", "True"]
        and all(path == "/" or path.startswith("/proc/") for path in seen.words[:-2])
    ),
    "the runtime's own mounts of / and of what covers /proc files lack nosuid; they hold no program",
)
OCI_PIDS = Difference(
    frozenset({"crun", "runc"}),
    lambda seen: len(seen.words) == 1 and 10 <= int(seen.words[0]) <= 15,
    "helpers of the runtime that are just ending count too",
)


def runsc(check: Check, why: str) -> Difference:
    """gVisor: the job's kernel is a program, whose pid 1 is the job's own first process."""
    return Difference(frozenset({"runsc"}), check, why)


RUNSC_NOSUID: Check = lambda seen: seen.words[-2:] == ["True", "True"]  # noqa: E731 - one of a table
NO_RESULT: Check = lambda seen: seen.outcome.result is None  # noqa: E731 - as above
OWN_PID_1 = "pid 1 is the job's own first process, of the job's own uid"
