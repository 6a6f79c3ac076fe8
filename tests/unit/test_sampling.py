"""The sampler of CPU time, and what the benchmark makes of its stacks."""

import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks.costs import LOOP, functions_of
from dataplane.sampling import FOLDER_VARIABLE, SIGNAL, Sampler, sample_if_asked


def _burn(cpu_s: float) -> None:
    until = time.thread_time() + cpu_s
    while time.thread_time() < until:
        pass


def test_cpu_time_counts_where_it_was_used_and_waiting_does_not(tmp_path: Path) -> None:
    path = tmp_path / "here.folded"
    sampler = Sampler(path)
    before = signal.getsignal(signal.SIGPROF)
    sampler.toggle(SIGNAL, None)
    _burn(0.1)
    waiting = threading.Thread(target=time.sleep, args=(0.05,), name="waits")
    waiting.start()
    waiting.join()
    sampler.toggle(SIGNAL, None)
    signal.signal(signal.SIGPROF, before)

    spent_us: dict[str, int] = {}
    for line in path.read_text().splitlines():
        stack, _, used = line.rpartition(" ")
        spent_us[stack] = int(used)
    burnt = sum(us for stack, us in spent_us.items() if f"{__name__}._burn" in stack)
    assert burnt > 50_000
    assert sum(us for stack, us in spent_us.items() if stack.startswith("waits;")) < burnt / 10


def test_nothing_is_installed_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed: list[object] = []
    monkeypatch.setattr(signal, "signal", lambda number, _handler: installed.append(number))
    sample_if_asked("agent", {})
    assert not installed
    sample_if_asked("agent", {FOLDER_VARIABLE: str(tmp_path)})
    assert installed == [SIGNAL]


def test_functions_of_ours_are_counted_once_per_stack_with_what_they_call() -> None:
    folded = (
        "MainThread;asyncio.runners.Runner.run;idl.a.f;idl.a.g;idl.a.f 3000\n"
        "MainThread;asyncio.runners.Runner.run;idl.a.f;json.dumps 1000\n"
        "MainThread;asyncio.runners.Runner.run 2000\n"
        "kafka-tail;threading.run;dataplane.tail.Tail._run 500\n"
    )
    assert functions_of(folded, jobs=10) == {
        "idl.a.f": 0.4,
        "idl.a.g": 0.3,
        LOOP: 0.2,
        "dataplane.tail.Tail._run": 0.05,
    }
