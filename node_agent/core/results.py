"""Sandbox outcome → attempt result, and assign → sandbox plan. Pure mappings."""

from typing import Final

import msgspec

from idl.control import AssignIntent
from idl.jobs import JobInput, Limits, network_of, profile_of, required_limits
from idl.limits import RESULT_BYTES_MAX
from idl.records import AttemptResult, Outcome, Usage
from node_agent.core.gpus import NO_GPUS, GpuDevices
from node_agent.core.images import ReadyImage
from node_agent.sandbox.plan import Limit, PlacedInput, SandboxOutcome, SandboxPlan

PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

INPUT_FOLDER: Final = "in"
"""Below /work: read-only inputs."""
_SAME: Final = frozenset(Limits.__struct_fields__) & frozenset(SandboxPlan.__struct_fields__)

_OUTCOMES: Final[dict[str, Outcome]] = {
    "signalled": "signalled",
    "timed_out": "timed_out",
    "out_of_memory": "out_of_memory",
    "killed": "killed",
    "sandbox_failed": "platform",
    "lease_over": "node_lost",
}


def outcome_of(outcome: SandboxOutcome) -> Outcome:
    """How the leader is to see it: exit 0 succeeded, any other exit failed."""
    if outcome.cause == "exited":
        return "succeeded" if outcome.exit_code == 0 else "failed"
    return _OUTCOMES[outcome.cause]


def environment(
    assign: AssignIntent,
    node: str,
    gpus: GpuDevices = NO_GPUS,
    image: ReadyImage | None = None,
) -> dict[str, str]:
    """The job's environment: defaults, its image's, its own, then ours, which none can override."""
    return {
        "PATH": PATH_DEFAULT,
        "HOME": "/work",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        **(image.env if image else {}),
        **assign.spec.env,
        **gpus.environment(assign),
        "OUTRIDER_JOB_ID": assign.job,
        "OUTRIDER_ATTEMPT": str(assign.attempt),
        "OUTRIDER_QUEUE": assign.queue,
        "OUTRIDER_NODE": node,
        "OUTRIDER_RESULT": "/work/result",
    }


def plan_of(
    assign: AssignIntent,
    node: str,
    gpus: GpuDevices = NO_GPUS,
    lease_until_ms: int = 0,
    image: ReadyImage | None = None,
) -> SandboxPlan:
    """What the sandbox is asked to carry out."""
    spec = assign.spec
    waived = {Limit.CPUSET} if gpus.simulated else set[Limit]()
    plan = SandboxPlan(
        key=f"{assign.job}.{assign.attempt}",
        argv=spec.command,
        env=environment(assign, node, gpus, image),
        image=image.root if image else "",
        memory_bytes=spec.resources.memory_bytes,
        cpu_millis=spec.resources.cpu_millis,
        result_bytes_max=RESULT_BYTES_MAX,
        profile=profile_of(spec),
        network=network_of(spec),
        devices=gpus.of(assign),
        cpus=() if gpus.simulated else assign.cpus,
        mems=() if gpus.simulated else assign.mems,
        inputs=tuple(placed_input(name, given) for name, given in spec.inputs.items()),
        outputs=spec.outputs,
        require=frozenset(Limit(name) for name in required_limits(spec)) - waived,
        lease_until_ms=lease_until_ms,
    )
    return msgspec.structs.replace(plan, **_limits(spec.limits))


def placed_input(name: str, given: JobInput) -> PlacedInput:
    """Where an input lies below /work: read-only ones in a folder of their own."""
    path = name if given.writable else f"{INPUT_FOLDER}/{name}"
    return PlacedInput(path=path, size_bytes=given.size_bytes, writable=given.writable)


def _limits(limits: Limits) -> dict[str, int]:
    """Fields that plan and job call by one name, and the two caps of the output."""
    both = {name: getattr(limits, name) for name in _SAME}
    half = limits.output_bytes // 2
    return {**both, "stdout_bytes_max": half, "stderr_bytes_max": half}


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
            cpu_user_ms=outcome.cpu_user_ms,
            cpu_system_ms=outcome.cpu_system_ms,
            throttled_ms=outcome.throttled_ms,
            pids_peak=outcome.pids_peak,
            io_read_bytes=outcome.io_read_bytes,
            io_write_bytes=outcome.io_write_bytes,
            pressure=outcome.pressure,
            memory_events=outcome.memory_events,
        ),
        stdout_bytes=outcome.stdout_bytes,
        stderr_bytes=outcome.stderr_bytes,
        output_truncated=outcome.output_truncated,
        result=outcome.result,
        outputs=outcome.outputs,
        outputs_missing=outcome.outputs_missing,
    )
