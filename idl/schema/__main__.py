"""Writes `job.v1.json` from the code."""

from idl.schema import JOB_SCHEMA_FILE, job_schema_text

JOB_SCHEMA_FILE.write_text(job_schema_text())
