"""Where a process of ours spends its CPU time, as stacks: off unless $OUTRIDER_SAMPLES is set.

A timer of CPU time (ITIMER_PROF, setitimer(2)) interrupts the main thread every PERIOD_S of CPU
that the process uses; each thread's stack then counts with the CPU time that this thread used
since (pthread_getcpuclockid(3)). The main thread is caught between two bytecodes, the others where
they gave up the interpreter's lock, so for them the place is less exact than the sum.
Threads of C libraries have no Python stack: `/proc/PID/task` tells what they use.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Final

FOLDER_VARIABLE: Final = "OUTRIDER_SAMPLES"
"""Folder for what was sampled; without it nothing is installed."""
PERIOD_S: Final = 0.002
"""CPU time between samples: 500 in a second of CPU, at well under 5 % of it."""
STACK_FRAMES_MAX: Final = 64
"""Frames kept per stack, the innermost; ours are at most half as deep."""
SIGNAL: Final = signal.SIGUSR2
"""Starts sampling; the next one ends it and writes what was found."""


def sample_if_asked(name: str, environ: Mapping[str, str]) -> None:
    """Installs the sampler of this process where the environment names a folder for it."""
    folder = environ.get(FOLDER_VARIABLE, "")
    if folder:
        signal.signal(SIGNAL, Sampler(Path(folder) / f"{name}.{os.getpid()}.folded").toggle)


class Sampler:
    """CPU µs by stack. Lives on the main thread: signal handlers run nowhere else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._on = False
        self._stacks: Counter[str] = Counter()
        self._used_ns: dict[int, int] = {}

    def toggle(self, _number: int, _frame: FrameType | None) -> None:
        """Starts, or ends and writes folded stacks: `thread;outer;…;inner µs`, one a line."""
        self._on = not self._on
        if self._on:
            self._stacks.clear()
            self._used_ns = {ident: _cpu_ns(ident) for ident in sys._current_frames()}
            signal.signal(signal.SIGPROF, self._sample)
            signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        whole = "".join(f"{stack} {ns // 1000}\n" for stack, ns in self._stacks.most_common())
        draft = self._path.with_suffix(".new")
        draft.write_text(whole)
        draft.rename(self._path)  # whoever waits for it reads it whole

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        main = threading.main_thread().ident
        for ident, own in sys._current_frames().items():
            used = _cpu_ns(ident)
            spent = used - self._used_ns.get(ident, used)
            self._used_ns[ident] = used
            if spent > 0:
                stack = frame if ident == main and frame is not None else own
                self._stacks[f"{names.get(ident, 'unnamed')};{folded(stack)}"] += spent


def folded(frame: FrameType | None) -> str:
    """`module.function;…`, outermost first."""
    names: list[str] = []
    while frame is not None and len(names) < STACK_FRAMES_MAX:
        names.append(f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}")
        frame = frame.f_back
    return ";".join(reversed(names))


def _cpu_ns(ident: int) -> int:
    """CPU time of a live thread; 0 for one that has just ended."""
    try:
        return time.clock_gettime_ns(time.pthread_getcpuclockid(ident))
    except OSError:
        return 0
