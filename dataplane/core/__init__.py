"""Pure: no I/O, clock, randomness or client library (checked by tests/tidy)."""
