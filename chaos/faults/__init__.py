"""Faults on real processes, each with its healing, and what of them this machine can do."""
