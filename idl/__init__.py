"""Everything that crosses a process: ids, units, Kafka records, DDS messages, topic tables.

Imports nothing of ours. Records are versioned and read tolerantly: unknown fields are ignored,
unknown versions are refused with a reason (see `idl.codec`).
"""
