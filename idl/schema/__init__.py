"""The JSON Schema of a job, for submitters in any language; generated from `idl.jobs.JobSpec`.

`python -m idl.schema` writes `job.v1.json` anew; a test keeps the file in step with the code.
The types come from msgspec, the bounds from `idl.limits` (`validate_spec` checks the same ones).
"""

import json
from pathlib import Path
from typing import Any, Final

import msgspec

from idl import limits as bound
from idl.ids import NAME_PATTERN
from idl.jobs import LIMIT_BOUNDS, JobSpec

JOB_SCHEMA_FILE: Final = Path(__file__).parent / "job.v1.json"
SCHEMA_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

BOUNDS: Final[dict[tuple[str, str], tuple[int, int]]] = {
    ("Resources", "cpu_millis"): (10, bound.CPU_MILLIS_MAX),
    ("Resources", "memory_bytes"): (bound.MEMORY_BYTES_MIN, bound.MEMORY_BYTES_MAX),
    ("Resources", "gpus"): (0, bound.GPUS_MAX),
    ("Resources", "gpu_memory_bytes_min"): (0, bound.MEMORY_BYTES_MAX),
    ("Resources", "gpu_share_millis"): (0, 1000),
    ("Resources", "gpu_share_memory_bytes"): (0, bound.MEMORY_BYTES_MAX),
    **{("Limits", name): limits for name, limits in LIMIT_BOUNDS.items()},
    ("Retry", "max_attempts"): (1, bound.ATTEMPTS_MAX),
    ("Retry", "backoff_ms"): (0, bound.WALL_MS_MAX),
    ("Retry", "backoff_max_ms"): (0, bound.WALL_MS_MAX),
    ("Retry", "factor"): (1, 100),
    ("JobSpec", "v"): (1, 1),
    ("JobSpec", "priority"): (-bound.PRIORITY_MAX, bound.PRIORITY_MAX),
    ("JobSpec", "start_within_ms"): (0, bound.WALL_MS_MAX),
    ("PayloadRef", "size_bytes"): (0, bound.PAYLOAD_BYTES_MAX),
}
"""Inclusive bounds of numbers; the test proves that `validate_spec` refuses what lies outside."""


def job_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the job record in JSON form."""
    schema = msgspec.json.schema(JobSpec)
    parts = schema["$defs"]
    for (struct, field), (low, high) in BOUNDS.items():
        parts[struct]["properties"][field] |= {"minimum": low, "maximum": high}
    job = parts["JobSpec"]["properties"]
    for name in ("id", "group", "image"):
        job[name]["pattern"] = f"^$|{NAME_PATTERN.pattern}"
    job["command"] |= {"minItems": 1, "maxItems": bound.COMMAND_ARGUMENTS_MAX}
    return {"$schema": SCHEMA_DIALECT, "title": "Outrider job, version 1", **schema}


def job_schema_text() -> str:
    """What `job.v1.json` holds."""
    return json.dumps(job_schema(), indent=2) + "\n"
