"""Whole clusters of pure cores in one process: a simulator from one seed, and readable scripts."""
