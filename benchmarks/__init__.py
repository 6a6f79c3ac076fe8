"""Measurements: ratios side by side in one run. Nothing here asserts a wall-clock time."""
