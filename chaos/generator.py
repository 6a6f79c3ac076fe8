"""The load, planned from a seed: when each job is submitted, what it is, how it may end. Pure.

The same scenario, seed and duration give the same plan, job by job and byte by byte; what the
cluster makes of it is another matter.
"""

import hashlib
import random
from typing import Final

import msgspec

from chaos.scenario import Generator, JobKind, Scenario
from idl.jobs import LimitName
from idl.units import parse_ms
from outrider.client.job import Job

RETRIES: Final = 60
"""Attempts that faults may cost a job before its end would say more of the nemesis than of us."""
BACKOFF: Final = "100ms"
BACKOFF_MAX: Final = "1s"
CANCEL_AFTER_S: Final = (0.3, 3.0)
"""From the submission to the order to cancel it: some are pending then, some run."""
LONG_S: Final = 15
"""A job that is to be cancelled sleeps this long: an order lost shows as `finished`, not never."""
POISON: Final = (
    b"not a job", b'{"command": "true"', b'{"v": 1, "command": []}', b"\xff\xfe\x00 garbage",
    b'{"v": 99, "command": ["/bin/true"]}',
)  # fmt: skip

ENDS: Final[dict[JobKind, tuple[str, ...]]] = {
    "quick": ("finished",),
    "work": ("finished",),
    "failing": ("dead-lettered",),
    "flaky": ("finished",),
    "timeout": ("dead-lettered",),
    "cancelled": ("cancelled", "finished"),
    "large": ("finished",),
    "duplicate": ("finished",),
}
"""`cancelled` may finish: the order overtook its submission, or came when the job had ended."""


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do `at_s` after the load began. `name` is unique within the run."""

    at_s: float
    kind: JobKind
    name: str
    script: str = ""
    payload: bytes = b""
    result: bytes | None = None
    """What $OUTRIDER_RESULT must hold; None: any."""
    cancel_after_s: float = 0.0


def _script(kind: JobKind, name: str, load: Generator, dice: random.Random) -> str:
    shortest, longest = (parse_ms(text) / 1000 for text in load.work)
    nap = dice.uniform(shortest, longest)
    say = f"printf %s {name} > $OUTRIDER_RESULT"
    return {
        "quick": say,
        "work": f"sleep {nap:.3f}; {say}",
        "failing": "exit 3",
        "flaky": f"[ $OUTRIDER_ATTEMPT -ge 3 ] || exit 4; {say}",
        "timeout": "sleep 60",
        "cancelled": f"sleep {LONG_S}; {say}",
        "large": "sha256sum | cut -c1-64 | tr -d '\\n' > $OUTRIDER_RESULT",
        "poisoned": "",
        "duplicate": say,
    }[kind]


def _planned(
    kind: JobKind, index: int, at_s: float, load: Generator, dice: random.Random
) -> Planned:
    name = f"{kind}-{index:06d}"
    script = _script(kind, name, load, dice)
    payload, result, cancel = b"", name.encode(), 0.0
    if kind == "large":
        payload = dice.randbytes(dice.randint(*load.large))
        result = hashlib.sha256(payload).hexdigest().encode()
    elif kind == "poisoned":
        payload = dice.choice(POISON)
    elif kind == "cancelled":
        cancel = dice.uniform(*CANCEL_AFTER_S)
    known = ENDS.get(kind) == ("finished",)
    return Planned(at_s=at_s, kind=kind, name=name, script=script, payload=payload,
                   result=result if known else None, cancel_after_s=cancel)  # fmt: skip


def plan(scenario: Scenario, seed: int, duration_s: float) -> list[Planned]:
    """Everything to submit in `duration_s`, in order of time."""
    dice = random.Random(f"load/{seed}")
    load = scenario.generator
    kinds, weights = list(load.mix), list(load.mix.values())
    found: list[Planned] = []
    at_s = dice.expovariate(load.rate)
    while at_s < duration_s:
        kind = dice.choices(kinds, weights)[0]
        found.append(_planned(kind, len(found), at_s, load, dice))
        at_s += dice.expovariate(load.rate)
    return found


def job_of(planned: Planned, run: str, load: Generator, unenforced: tuple[LimitName, ...]) -> Job:
    """The job as it is submitted; `run` makes its id unique in the ledger."""
    fails = planned.kind in ("failing", "timeout")
    return Job(
        ("/bin/sh", "-c", planned.script),
        id=f"{run}-{planned.name}",
        group=run,
        env={"CHAOS": run},
        payload=planned.payload or None,
        cpu=load.cpu,
        memory=load.memory,
        timeout="500ms" if planned.kind == "timeout" else "40s",
        grace="100ms",
        retries=1 if fails else RETRIES,
        retry_on=("failed", "signalled", "platform", "node_lost"),
        backoff=BACKOFF,
        backoff_max=BACKOFF_MAX,
        allow_unenforced=unenforced,
    )
