"""Runs a module at the lowest priority: `python -m controlplane.background MODULE ARGUMENT…`.

A coordinator may be a real-time process, and what it starts inherits that until it says otherwise.
This says so first, before the module's own imports (a third of a second) run.
"""

import os
import runpy
import sys
from typing import Final

NICE: Final = 10
"""Below coordinators and jobs: nobody waits for what runs here."""


def main() -> None:
    """Gives up every privilege of scheduling and becomes MODULE."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
