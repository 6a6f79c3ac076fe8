"""The data plane: everything that goes through Kafka. Imports `idl` only.

Where to look: `broker/` starts one, `kafka` configures clients, `topics` creates topics, `submit`
puts jobs into queues, `ledger` appends and reads decisions, `tail` reads any topic by offset,
`producer` writes any topic; `payloads`, `results`, `logs`, `commands`, `dead_letter` are the
records of those names; `core/` holds the rules that need no Kafka.
"""
