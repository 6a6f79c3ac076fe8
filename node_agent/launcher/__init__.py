"""The launcher: a small, single-threaded process that forks every job of one agent.

Everything here runs under ``python -I -S`` with the standard library only and as few imports as
possible: the cost of a job is dominated by copying this process's page tables (9 MB of resident
memory forks in 1.4 ms, 86 MB in 7 ms), and the less code runs with privileges the better.
"""
