"""Scenarios parse or say what is wrong; load and faults follow from the seed alone."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import pytest

from chaos import generator, nemesis
from chaos.checkers import CHECKERS
from chaos.cli import main
from chaos.scenario import (
    JOB_KINDS,
    FaultSpec,
    Scenario,
    built_in,
    load_scenario,
    parse_scenario,
    percent,
    signed_ms,
)
from idl.errors import ConfigError
from idl.units import parse_ms

NAMES = frozenset(CHECKERS)
ALL = """
about: everything
generator:
  rate: 20
  mix: {quick: 1, work: 1, failing: 1, flaky: 1, timeout: 1, cancelled: 1, large: 1,
        poisoned: 1, duplicate: 1}
  large: [1000, 2000]
nemesis:
  - {fault: kill, target: leader, every: 3s}
  - {fault: pause, target: any, every: 2s, jitter: 0.5, first: 1s, lasts: 500ms}
"""


@pytest.mark.parametrize("name", built_in())
def test_every_scenario_that_comes_with_the_harness_is_good(name: str) -> None:
    scenario = load_scenario(name, NAMES)
    assert scenario.name == name
    assert scenario.about


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("about: [", "while parsing"),
        ("generator: {rate: 1}", "about"),
        ("about: x\nweather: bad", "weather"),
        ("about: x\ngenerator: {rate: 0}", "rate is 0"),
        ("about: x\ngenerator: {mix: {}}", "mix needs"),
        ("about: x\ngenerator: {mix: {slow: 1}}", "slow"),
        ("about: x\ncluster: {coordinators: 0}", "1 to 9 coordinators"),
        ("about: x\ncluster: {kafka: apache, network: namespaces}", "use embedded"),
        ("about: x\nnemesis: [{fault: flood}]", "flood"),
        ("about: x\nnemesis: [{fault: kill, every: 0s}]", "longer than nothing"),
        ("about: x\nnemesis: [{fault: kill, jitter: 2}]", "jitter"),
        ("about: x\nnemesis: [{fault: kill, every: often}]", "often"),
        ("about: x\nnemesis: [{fault: kill, target: broker}]", "broker_kill"),
        ("about: x\nnemesis: [{fault: broker_kill, target: broker}]", "keeps everything in memory"),
        ("about: x\nnemesis: [{fault: partition}]", "needs `network: namespaces`"),
        ("about: x\ncluster: {network: namespaces}\nnemesis: [{fault: loss, amount: 120%}]",
         "from 0% to 100%"),
        ("about: x\ncheckers: [luck]", "checker 'luck' is not known"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"scenario mine") as told:
        parse_scenario(text, "mine", NAMES)
    assert says in str(told.value)


def test_an_unknown_scenario_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="kills"):
        load_scenario("no-such-scenario")


def test_a_scenario_is_shown_or_it_is_told_which_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("about: mine\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff")
    assert main(["show", "kills"]) == 0
    assert main(["show", str(own)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{built_in()['kills']}\nabout: mine\n\n"
    for wrong, says in (
        ("nosuch", "no scenario 'nosuch'; there are"), ("no.yaml", "No such file"),
        (str(tmp_path / "bytes.yaml"), "not UTF-8"), (str(tmp_path), "Is a directory"),
    ):  # fmt: skip
        assert main(["show", wrong]) == 2
        told = capsys.readouterr()
        assert says in told.err and told.err.count("\n") == 1
        assert told.out == ""


def test_amounts() -> None:
    assert signed_ms("-30s") == -30_000
    assert signed_ms("2m") == 120_000
    assert percent("12.5%") == 12.5


def test_the_load_follows_from_the_seed() -> None:
    scenario = parse_scenario(ALL, "all")
    first = generator.plan(scenario, 7, 60)
    assert first == generator.plan(scenario, 7, 60)
    assert first != generator.plan(scenario, 8, 60)
    assert [one.at_s for one in first] == sorted(one.at_s for one in first)
    assert 900 < len(first) < 1500
    assert set(Counter(one.kind for one in first)) == set(JOB_KINDS)
    assert len({one.name for one in first}) == len(first)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    scenario = parse_scenario(ALL, "all")
    short, long = generator.plan(scenario, 7, 10), generator.plan(scenario, 7, 20)
    assert long[: len(short)] == short


def test_what_jobs_are_to_write() -> None:
    for one in generator.plan(parse_scenario(ALL, "all"), 7, 60):
        if one.kind == "large":
            assert 1000 <= len(one.payload) <= 2000
            assert one.result == hashlib.sha256(one.payload).hexdigest().encode()
        elif one.kind in ("failing", "timeout", "cancelled", "poisoned"):
            assert one.result is None
        else:
            assert one.result == one.name.encode()
        assert bool(one.cancel_after_s) == (one.kind == "cancelled")


def test_every_planned_job_can_be_submitted() -> None:
    scenario = parse_scenario(ALL, "all")
    for one in generator.plan(scenario, 7, 10):
        if one.kind != "poisoned":
            job = generator.job_of(one, "run", scenario.generator, ())
            assert job.submission().spec.id == f"run-{one.name}"


def test_faults_follow_from_the_seed_and_keep_their_period() -> None:
    scenario = parse_scenario(ALL, "all")
    first = nemesis.plan(scenario, 7, 300)
    assert first == nemesis.plan(scenario, 7, 300)
    assert first != nemesis.plan(scenario, 8, 300)
    assert [fault.at_s for fault in first] == sorted(fault.at_s for fault in first)
    assert [fault.number for fault in first] == list(range(1, len(first) + 1))
    for spec in scenario.nemesis:
        times = [fault.at_s for fault in first if fault.spec is spec]
        every = parse_ms(spec.every) / 1000
        for before, after in itertools.pairwise(times):
            assert abs(after - before - every) <= every * spec.jitter + 1e-9
    pauses = [fault for fault in first if fault.spec.fault == "pause"]
    assert pauses[0].at_s == 1.0
    assert {fault.lasts_s for fault in pauses} == {0.5}


COORDINATORS, AGENTS = ("c1", "c2", "c3"), ("n1", "n2")


@pytest.mark.parametrize(
    ("target", "busy", "allowed", "count"),
    [
        ("leader", (), {"c2"}, 1),
        ("leader", ("c2",), set(), 0),
        ("standby", (), {"c1", "c3"}, 1),
        ("coordinator", ("c1",), {"c2", "c3"}, 1),
        ("agent", ("n1",), {"n2"}, 1),
        ("any", (), {*COORDINATORS, *AGENTS}, 1),
        ("minority", (), set(COORDINATORS), 1),
        ("majority", (), set(COORDINATORS), 2),
        ("majority", ("c1", "c2"), set(), 0),
        ("coordinators", ("c3",), {"c1", "c2"}, 2),
        ("agents", (), set(AGENTS), 2),
        ("broker", (), {"broker"}, 1),
    ],
)
def test_whom_a_fault_hits(
    target: str, busy: tuple[str, ...], allowed: set[str], count: int
) -> None:
    spec = FaultSpec(fault="pause", target=target)  # type: ignore[arg-type] # rows of a table
    for dice in range(20):
        found = nemesis.choose(spec, dice, COORDINATORS, AGENTS, "c2", frozenset(busy))
        assert len(found) == count
        assert set(found) <= allowed
        assert found == nemesis.choose(spec, dice, COORDINATORS, AGENTS, "c2", frozenset(busy))


def test_defaults_are_a_scenario() -> None:
    assert generator.plan(Scenario(about="x"), 1, 5)
