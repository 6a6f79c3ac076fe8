"""What the lives met, against what there is: a kind that never occurred was never tested."""

from collections.abc import Mapping
from typing import Final, get_args

from chaos.sim.faults import FAULTS
from dataplane.core.jobs import TRANSITIONS
from dataplane.core.validity import VoidReason
from idl.ledger import Decision

UNREACHABLE: Final[Mapping[str, str]] = {
    "void:gap": "one entry in flight: the next is appended only after the last was read back",
    "void:malformed": "no leader writes TermStarted but as its first decision",
    "void:term_not_started": "an entry follows its read-back TermStarted, in every reader's order",
}
"""What must not occur while leaders are ours, and why; `tests/unit` and the model check have it."""


def everything() -> list[str]:
    """Every kind that a long enough run should meet, and those that it must not."""
    return [
        *(f"fault:{kind}" for kind in FAULTS),
        *(f"decision:{kind.__name__}" for kind in get_args(Decision)),
        *(f"transition:{phase}→{cause}" for phase, cause in TRANSITIONS),
        *(f"void:{reason}" for reason in get_args(VoidReason)),
    ]


def missing(counts: Mapping[str, int]) -> list[str]:
    """Kinds that never occurred and could have."""
    return [kind for kind in everything() if not counts.get(kind) and kind not in UNREACHABLE]


def table(counts: Mapping[str, int]) -> list[str]:
    """One line per group: kind and count, in the order of the code; then the rest of the counts."""
    lines: list[str] = []
    known = everything()
    for group in ("fault", "decision", "transition", "void"):
        kinds = [kind for kind in known if kind.startswith(f"{group}:")]
        lines.append(f"{group}s")
        for kind in kinds:
            note = UNREACHABLE.get(kind, "NEVER OCCURRED")
            count = counts.get(kind, 0)
            lines.append(f"  {kind.partition(':')[2]:<28}{count:>10}{'' if count else '  ' + note}")
    others = sorted(kind for kind in counts if kind not in known and not kind.startswith("ms:"))
    lines.append("others")
    lines += [f"  {kind:<28}{counts[kind]:>10}" for kind in others]
    return lines
