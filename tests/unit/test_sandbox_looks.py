"""Looks at CPU time: used up, idle, busy, and how often the launcher looks."""

from node_agent.launcher.looks import LOOK_S_MIN, Looks


def test_without_limits_nobody_looks() -> None:
    assert Looks(0, 0, 1.0, 5.0).at == float("inf")


def test_cpu_time_is_looked_at_no_sooner_than_it_can_be_used_up() -> None:
    looks = Looks(10_000, 0, 2.0, 100.0)
    assert looks.at == 105.0
    assert looks.look(105.0, 4_000_000) == ""
    assert looks.at == 108.0
    assert looks.look(108.0, 9_999_999) == ""
    assert looks.at == 108.0 + LOOK_S_MIN
    assert looks.look(108.01, 10_000_000) == "cpu: used more than 10000 ms of CPU time"


def test_a_job_without_output_and_cpu_time_is_idle() -> None:
    looks = Looks(0, 8_000, 1.0, 0.0)
    said = [looks.look(float(second), 1000 * second) for second in range(1, 9)]
    assert said[:-1] == [""] * 7
    assert said[-1] == "idle: no output and next to no CPU time for 8000 ms"


def test_output_or_cpu_time_is_progress() -> None:
    looks = Looks(0, 4_000, 1.0, 0.0)
    now, used_us = 0.0, 0
    for step in range(20):
        now = looks.at
        looks.output = step % 4 == 0
        used_us += 20_000 if step % 4 == 2 else 0
        assert looks.look(now, used_us) == ""
    for _ in range(8):
        now = looks.at
        verdict = looks.look(now, used_us)
    assert verdict.startswith("idle")
