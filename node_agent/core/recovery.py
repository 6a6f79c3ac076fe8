"""What a restarted agent does about each attempt of its journal. Pure (ADR 0006).

| journal says            | launcher has it | then                                                |
|-------------------------|-----------------|-----------------------------------------------------|
| delivered               | –               | remembered, so that it never runs again             |
| ended                   | –               | its result is delivered                             |
| accepted … started      | yes             | adopted: output and end are taken from the launcher |
| accepted, not launching | no              | it never ran: run it now                            |
| launching, same launcher| no              | the request never arrived: run it now               |
| launching or started    | no, launcher new| it is gone with its launcher: the platform's fault  |
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from idl.control import AssignIntent
from node_agent.core.attempts import Effect, Phase, RefuseAttempt, Restored, RunAttempt
from node_agent.core.journal import Entry, JournalState, Key

LAUNCHER_DIED: Final = "the launcher died with the attempt while no agent was there"


class AdoptAttempt(msgspec.Struct, frozen=True, tag=True):
    """Go on with an attempt that the launcher has."""

    assign: AssignIntent
    entry: Entry


class DeliverAgain(msgspec.Struct, frozen=True, tag=True):
    """Deliver the result of an attempt that ended before the restart."""

    assign: AssignIntent
    entry: Entry


RecoveryEffect = Effect | AdoptAttempt | DeliverAgain


class Recovery(msgspec.Struct, frozen=True):
    """`restored` is what the core starts from; `effects` are to be performed after that.
    `unknown` are the launcher's jobs that nobody accepted: they are killed."""

    restored: dict[Key, Restored]
    effects: tuple[RecoveryEffect, ...]
    unknown: tuple[str, ...]


def sandbox_key(job: str, attempt: int) -> str:
    """The attempt's name in the sandbox and of its spool."""
    return f"{job}.{attempt}"


def recover(state: JournalState, held: Iterable[str], same_launcher: bool) -> Recovery:
    """`held`: the launcher's jobs; `same_launcher`: it is the one that was there before."""
    unclaimed = set(held)
    restored: dict[Key, Restored] = {}
    effects: list[RecoveryEffect] = []
    for (job, attempt), entry in state.entries.items():
        name = sandbox_key(job, attempt)
        found = name in unclaimed and entry.assign is not None and entry.ended is None
        if found:
            unclaimed.discard(name)
        phase, effect = _decide(entry, found, same_launcher)
        restored[job, attempt] = Restored(entry.assign, phase, entry.lease_until_ms)
        if effect is not None:
            effects.append(effect)
    return Recovery(restored, tuple(effects), tuple(sorted(unclaimed)))


def _decide(entry: Entry, found: bool, same_launcher: bool) -> tuple[Phase, RecoveryEffect | None]:
    if entry.assign is None:
        return Phase.ENDED, None
    if entry.ended is not None:
        return Phase.REPORTING, DeliverAgain(entry.assign, entry)
    if found:
        phase = Phase.RUNNING if entry.started_ms else Phase.ACCEPTED
        return phase, AdoptAttempt(entry.assign, entry)
    if not entry.started_ms and (same_launcher or not entry.launching):
        return Phase.ACCEPTED, RunAttempt(entry.assign, entry.term, entry.lease_until_ms)
    phase = Phase.RUNNING if entry.started_ms else Phase.ACCEPTED
    return phase, RefuseAttempt(entry.assign, entry.term, "platform", LAUNCHER_DIED)
