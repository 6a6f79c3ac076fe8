"""A whole cluster in one process from one seed: real cores, simulated everything else.

`world` is time, dice and the story · `network`, `kafka` and `clock` are what may fail ·
`process` and `agent` drive the real cores as the product's shells do · `checker` judges every step
· `faults` is what goes wrong · `life` is one seed · `plants` are bugs put in on purpose ·
`shrink` makes a failing seed small · `model` explores small scopes exhaustively.
See docs/simulation.md.
"""
