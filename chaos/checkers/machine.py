"""The run's own machine: nothing left behind, no process ended that nobody had killed."""

from chaos.checkers.verdict import Verdict, judged
from chaos.history import FaultHealed, History, Left, Phase, ProcessEnded, of


def healing(history: History) -> Verdict:
    """Whether the harness healed what it broke; where it did not, nothing can be judged."""
    errors = tuple(event.error for event in of(FaultHealed, history) if event.error)
    return Verdict(checker="healing", outcome="unknown" if errors else "pass", problems=errors)


def leftovers(history: History) -> Verdict:
    """No process, cgroup, mount, namespace or link of the run is there after its end."""
    if not any(phase.name == "stopped" for phase in of(Phase, history)):
        return Verdict(checker="leftovers", outcome="unknown",
                       problems=("the cluster was not stopped by this run",))  # fmt: skip
    return judged("leftovers", (event.what for event in of(Left, history)))


def crashes(history: History) -> Verdict:
    """No process ended by itself: faults of others must not take it down."""
    ended = of(ProcessEnded, history)
    return judged("crashes", (f"{one.process} ended by itself: {one.log[-400:]}" for one in ended))
