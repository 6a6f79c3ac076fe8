"""Durable and heavy: brokers, topics, queues, the ledger and what it means, payloads, results."""
