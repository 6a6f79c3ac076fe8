"""Every bound of the system that is a contract between processes, in one place, with its reason."""

from typing import Final

from idl.units import GIB, KIB, MIB

PAYLOAD_INLINE_BYTES_MAX: Final = 64 * KIB
"""Above this the SDK uses the claim check: queue records must stay cheap for the leader to scan."""
PAYLOAD_BYTES_MAX: Final = 8 * MIB
"""One payload is one Kafka record; larger input belongs in an object store, by reference."""
KAFKA_RECORD_BYTES_MAX: Final = 10 * MIB
"""`max.message.bytes` of our topics: a payload plus its headers and base64 when it is JSON."""
SPEC_BYTES_MAX: Final = 64 * KIB
"""A spec without its payload travels in the ledger and in a DDS intent; both must stay small."""
COMMAND_ARGUMENTS_MAX: Final = 1024
"""argv entries of one job; a longer list is data and belongs in the payload."""
RESULT_INLINE_BYTES_MAX: Final = 64 * KIB
"""Above this the result bytes go to `payloads` by claim check."""
RESULT_BYTES_MAX: Final = 8 * MIB
"""Same bound as a payload: one job's result can be the next one's input."""
OUTPUT_TAIL_BYTES: Final = 4 * KIB
"""stdout/stderr tail inside the result record: what a person wants to see first."""
LOG_BYTES_MAX: Final = 1 * MIB
"""stdout+stderr kept per attempt; the rest is dropped, and the result says so."""
LOG_CHUNK_BYTES: Final = 32 * KIB
"""One `logs` record."""

INPUTS_MAX: Final = 64
"""Files of one job before it starts; more of them are one archive."""
INPUTS_INLINE_BYTES_MAX: Final = 8 * KIB
"""Inline inputs travel with the spec through the ledger and the intent; larger ones by claim
check."""
INPUTS_BYTES_MAX: Final = 64 * MIB
"""All inputs of one job: the agent holds them in memory until the job starts."""
OUTPUTS_MAX: Final = 32
"""Names and patterns of one job."""
OUTPUT_FILES_MAX: Final = 256
"""Files collected of one job: each may be a Kafka record and is an entry of the result record."""
OUTPUT_FILES_BYTES_MAX: Final = 64 * MIB
"""All collected files of one job; one of them is bounded by RESULT_BYTES_MAX."""
OUTPUT_FILES_INLINE_BYTES_MAX: Final = 32 * KIB
"""Collected files inside the result record, all together; the rest goes by claim check."""
OUTPUT_NAMES_SEEN_MAX: Final = 20_000
"""Directory entries looked at while collecting: bounds the time a job with 10⁶ names costs."""
FILE_DEPTH_MAX: Final = 16
"""Folders in the name of an input or output: enough for people, too few to exhaust a walker."""
FILE_NAME_BYTES_MAX: Final = 1024
"""Of the whole path below the work directory."""
OPEN_FILES_MIN: Final = 16
"""Fewer and a program cannot load its libraries."""
OPEN_FILES_MAX: Final = 65_536
"""Files that one process of a job may have open; the kernel's own hard default is not far."""
INODES_MIN: Final = 8
"""Room for the file system's own root and a file or two."""
INODES_MAX: Final = 1_000_000
"""Of /tmp or of /work: each costs about 1 KiB of the job's memory."""
OUTPUT_BYTES_MAX: Final = 16 * MIB
"""The most that a job may ask for as `limits.output_bytes`: the pipes and the spool bear it."""

LEDGER_BATCH_DECISIONS_MAX: Final = 512
"""Decisions in one ledger entry: keeps an entry under 1 MiB and a step on the loop under 10 ms."""
LEDGER_BATCH_BYTES_MAX: Final = 4 * MIB
"""An entry is cut before this; well below KAFKA_RECORD_BYTES_MAX."""
ENDED_JOBS_KEPT: Final = 100_000
"""Ended jobs remembered for deduplication and `outrider ls`; older ones are only in the ledger."""
LIVE_JOBS_MAX: Final = 20_000
"""Jobs a pool holds in memory; the rest of the backlog waits in Kafka (invariant 9)."""
INBOX_RECORDS_MAX: Final = 2_000
"""Records read ahead of decisions, per coordinator."""

MEMORY_BYTES_MIN: Final = 8 * MIB
"""Room for the sandbox's init process and the job's first pages."""
CPU_MILLIS_MAX: Final = 1_000_000
MEMORY_BYTES_MAX: Final = 64 * 1024 * GIB
GPUS_MAX: Final = 1024
GPU_NAME_CHARS_MAX: Final = 96
WALL_MS_MAX: Final = 30 * 86_400_000
PRIORITY_MAX: Final = 1_000_000
"""Sanity bounds of a spec: beyond any machine of today, so what exceeds them is a typing error."""
EPOCH_MS_MAX: Final = 2**53
"""Epoch ms that every reader can hold, JavaScript among them."""
TEXT_CHARS_MAX: Final = 256
"""Of a job's `name` and `submitter`, for people: ENDED_JOBS_KEPT of them are remembered."""
ATTEMPTS_MAX: Final = 100
"""A job retried more often than this is a loop, not a retry."""
