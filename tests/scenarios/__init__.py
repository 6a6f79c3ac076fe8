"""Whole lives of simulated clusters, and readable scripts."""
