"""Sandbox outcome → attempt result, and assign → sandbox plan. Pure mappings."""

from typing import Final

from idl.control import AssignIntent
from idl.limits import LOG_BYTES_MAX, RESULT_BYTES_MAX
from idl.records import AttemptResult, Outcome, Usage
from node_agent.core.attempts import required_limits
from node_agent.core.gpus import NO_GPUS, GpuDevices
from node_agent.sandbox.plan import Limit, SandboxOutcome, SandboxPlan

PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_OUTCOMES: Final[dict[str, Outcome]] = {
    "signalled": "signalled",
    "timed_out": "timed_out",
    "out_of_memory": "out_of_memory",
    "killed": "killed",
    "sandbox_failed": "platform",
}


def outcome_of(outcome: SandboxOutcome) -> Outcome:
    """How the leader is to see it: exit 0 succeeded, any other exit failed."""
    if outcome.cause == "exited":
        return "succeeded" if outcome.exit_code == 0 else "failed"
    return _OUTCOMES[outcome.cause]


def environment(assign: AssignIntent, node: str, gpus: GpuDevices = NO_GPUS) -> dict[str, str]:
    """The job's environment: defaults, its own, then ours, which it cannot override."""
    return {
        "PATH": PATH_DEFAULT,
        "HOME": "/work",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        **assign.spec.env,
        **gpus.environment(assign.gpus),
        "OUTRIDER_JOB_ID": assign.job,
        "OUTRIDER_ATTEMPT": str(assign.attempt),
        "OUTRIDER_QUEUE": assign.queue,
        "OUTRIDER_NODE": node,
        "OUTRIDER_RESULT": "/work/result",
    }


def plan_of(assign: AssignIntent, node: str, gpus: GpuDevices = NO_GPUS) -> SandboxPlan:
    """What the sandbox is asked to carry out."""
    spec = assign.spec
    return SandboxPlan(
        key=f"{assign.job}.{assign.attempt}",
        argv=spec.command,
        env=environment(assign, node, gpus),
        memory_bytes=spec.resources.memory_bytes,
        cpu_millis=spec.resources.cpu_millis,
        pids_max=spec.limits.pids_max,
        tmp_bytes=spec.limits.tmp_bytes,
        work_bytes=spec.limits.work_bytes,
        network=spec.isolation.network,
        wall_ms=spec.limits.wall_ms,
        grace_ms=spec.limits.grace_ms,
        stdout_bytes_max=LOG_BYTES_MAX // 2,
        stderr_bytes_max=LOG_BYTES_MAX // 2,
        result_bytes_max=RESULT_BYTES_MAX,
        devices=gpus.of(assign.gpus),
        require=frozenset(Limit(name) for name in required_limits(assign)),
    )


def result_of(
    assign: AssignIntent, node: str, term: int, outcome: SandboxOutcome, detail: str = ""
) -> AttemptResult:
    """The result record, without what only the driver knows (times, tails, log place)."""
    notes = [detail, outcome.detail, outcome.result_refused and f"result: {outcome.result_refused}"]
    return AttemptResult(
        job=assign.job,
        attempt=assign.attempt,
        node=node,
        term=term,
        outcome=outcome_of(outcome),
        detail="; ".join(note for note in notes if note),
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        usage=Usage(
            wall_ms=outcome.wall_ms,
            cpu_ms=outcome.cpu_ms,
            memory_peak_bytes=outcome.memory_peak_bytes,
        ),
        stdout_bytes=outcome.stdout_bytes,
        stderr_bytes=outcome.stderr_bytes,
        output_truncated=outcome.output_truncated,
        result=outcome.result,
    )
