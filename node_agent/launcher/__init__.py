"""The launcher: a small, single-threaded process that holds every job of one agent.

Everything here runs under ``python -I -S`` with the standard library only and as few imports as
possible: the less code runs with privileges the better. What a job's init does is worked out here
(``init.py``, ``command.py``) and run by a process that never was a Python one (``zygote.py``).
"""
