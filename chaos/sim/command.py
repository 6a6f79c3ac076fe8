"""`outrider-chaos simulate`: many seeds, a coverage table, and a small story for one that fails."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from typing import Any, Final

import click

from chaos.sim import coverage, model_report
from chaos.sim.life import Outcome, live
from chaos.sim.plants import PLANTS
from chaos.sim.shrink import Shrunk, shrink, tell

CHUNK: Final = 8
"""Seeds per errand to a worker process."""
PLANT_SEEDS_MAX: Final = 400
"""Seeds tried until a planted bug counts as not found."""
HARMLESS_SEEDS: Final = 100
"""Seeds tried for a plant that another defence makes harmless."""
FAILURES_MAX: Final = 5
"""After as many failing seeds a run stops: they are mostly one bug."""


def _live(seeds: list[int]) -> list[Outcome]:
    return [live(seed) for seed in seeds]


def _chunks(seeds: Iterator[int]) -> Iterator[list[int]]:
    while chunk := list(islice(seeds, CHUNK)):
        yield chunk


def _outcomes(seeds: Iterator[int], jobs: int, until: float | None) -> Iterator[Outcome]:
    """Outcomes in the order of seeds; no new errand after `until` (monotonic seconds)."""
    chunks = _chunks(seeds)
    if jobs <= 1:
        for chunk in chunks:
            yield from _live(chunk)
            if until is not None and time.monotonic() > until:
                return
        return
    with ProcessPoolExecutor(jobs) as pool:
        running = [pool.submit(_live, chunk) for chunk in islice(chunks, 2 * jobs)]
        while running:
            yield from running.pop(0).result()
            if until is None or time.monotonic() < until:
                running += [pool.submit(_live, chunk) for chunk in islice(chunks, 1)]


def _rerun(seed: int, plant: str = "") -> str:
    return f"python -m chaos.sim --seeds 1 --first {seed}" + (f" --plant {plant}" if plant else "")


def _say_failure(outcome: Outcome, plant: str = "") -> Shrunk | None:
    """The failing seed, how to run it again, and its smallest story."""
    click.echo(f"\nseed {outcome.seed} FAILS: {outcome.message}")
    click.echo(f"again: {_rerun(outcome.seed, plant)}")
    small = shrink(outcome.seed, plant)
    if small is None:
        click.echo("it did not fail the second time: determinism is broken, which is worse")
        return None
    click.echo(
        f"smallest plan after {small.runs} runs: {len(small.plan.faults)} of {small.faults_before} "
        f"faults, {len(small.plan.work)} of {small.work_before} pieces of work"
    )
    for line in tell(small.outcome):
        click.echo(line)
    return small


def _failure_json(outcome: Outcome, plant: str = "") -> dict[str, Any]:
    return {
        "seed": outcome.seed, "violation": outcome.violation, "message": outcome.message,
        "about": list(outcome.about), "again": _rerun(outcome.seed, plant),
    }  # fmt: skip


def find_plant(name: str, first: int, seeds: int) -> tuple[Outcome | None, int]:
    """The first life that finds the bug, and how many were tried."""
    for tried, seed in enumerate(range(first, first + seeds), 1):
        outcome = live(seed, plant=name)
        if outcome.violation:
            return outcome, tried
    return None, seeds


def _plants(names: list[str], first: int, seeds: int, *, as_json: bool, trace: bool) -> bool:
    """True where every plant did what its table says."""
    good, rows = True, []
    for name in names:
        kind = PLANTS[name]
        most = min(seeds, HARMLESS_SEEDS) if kind.why else seeds
        found, tried = find_plant(name, first, most)
        good &= (found is None) == bool(kind.why)
        if found is not None:
            verdict = f"found by seed {found.seed} after {tried}: {found.violation}"
        else:
            verdict = f"not found in {tried}: {kind.why}" if kind.why else f"NOT FOUND in {tried}"
        rows.append({"plant": name, "what": kind.what, "seeds": tried, "verdict": verdict,
                     "seed": found.seed if found else None})  # fmt: skip
        if not as_json:
            click.echo(f"{name:<30} {verdict}")
        if found is not None and trace and not as_json:
            _say_failure(found, name)
    if as_json:
        click.echo(json.dumps({"ok": good, "plants": rows}, indent=2))
    return good


def _progress(done: int, failures: int, started: float) -> None:
    rate = done / max(time.monotonic() - started, 0.001)
    click.echo(f"{done} seeds, {failures} failed, {rate:.1f} a second", err=True)


def _many(first: int, seeds: int, jobs: int, minutes: float, *, as_json: bool) -> bool:
    """True where no seed failed."""
    started = time.monotonic()
    wanted = count(first) if minutes else iter(range(first, first + seeds))
    until = started + minutes * 60 if minutes else None
    total: Counter[str] = Counter()
    done = steps = simulated = 0
    failures: list[Outcome] = []
    for outcome in _outcomes(wanted, jobs, until):
        done += 1
        steps += outcome.steps
        simulated += outcome.counts.get("ms:simulated", 0)
        total.update(outcome.counts)
        if outcome.violation:
            failures.append(outcome)
            if len(failures) >= FAILURES_MAX:
                break
        if done % 100 == 0 and not as_json:
            _progress(done, len(failures), started)
    took = time.monotonic() - started
    absent = coverage.missing(total)
    if as_json:
        click.echo(json.dumps({
            "ok": not failures, "seeds": done, "first": first, "seconds": round(took, 1),
            "steps": steps, "counts": dict(sorted(total.items())), "never_occurred": absent,
            "failures": [_failure_json(outcome) for outcome in failures],
        }, indent=2))  # fmt: skip
        return not failures
    click.echo("\n".join(coverage.table(total)))
    hours = simulated / 3_600_000
    click.echo(f"\n{done} seeds in {took:.0f} s: {steps} steps, {hours:.1f} simulated hours, "
               f"{len(failures)} failed, {len(absent)} kinds never occurred")  # fmt: skip
    for outcome in failures[:1]:
        _say_failure(outcome)
    for outcome in failures[1:]:
        click.echo(f"seed {outcome.seed} FAILS too: {outcome.message.splitlines()[0]}")
    return not failures


def _trace(seed: int, plant: str, *, story: bool) -> bool:
    outcome = live(seed, plant=plant, keep_story=story)
    for line in tell(outcome) if story else []:
        click.echo(line)
    click.echo(f"{seed} {outcome.digest} {outcome.entries} entries {outcome.steps} steps")
    return not outcome.violation


@click.command()
@click.option("--seeds", default=200, show_default=True, help="How many lives.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--minutes", default=0.0, help="Go on for so long instead of --seeds.")
@click.option("--plant", default="", help="A bug to plant: a name, 'all', or 'list'.")
@click.option("--trace", is_flag=True, help="Print each seed's digest (with --plant: the story).")
@click.option("--story", is_flag=True, help="With --trace: who led, which faults.")
@click.option("--model", "check_model", is_flag=True, help="Explore the small model instead.")
@click.option("--wide", is_flag=True, help="With --model: the wide scope, millions of states.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def simulate(
    seeds: int, first: int, jobs: int, minutes: float, plant: str, trace: bool, story: bool,
    check_model: bool, wide: bool, as_json: bool,
) -> None:  # fmt: skip
    """Live whole clusters of the real cores from seeds, and check every invariant.

    Exit code 1 where an invariant broke (or a planted bug was not found).
    """
    if check_model:
        good = model_report.report(wide=wide, as_json=as_json)
    elif plant == "list":
        for name, kind in PLANTS.items():
            click.echo(f"{name:<30} {kind.what}")
        good = True
    elif plant:
        if plant != "all" and plant not in PLANTS:
            raise click.BadParameter(f"no plant {plant!r}; see --plant list", param_hint="--plant")
        names = list(PLANTS) if plant == "all" else [plant]
        asked = click.get_current_context().get_parameter_source("seeds")
        most = seeds if asked is click.core.ParameterSource.COMMANDLINE else PLANT_SEEDS_MAX
        good = _plants(names, first, most, as_json=as_json, trace=trace)
    elif trace or story:
        verdicts = [_trace(seed, "", story=story) for seed in range(first, first + seeds)]
        good = all(verdicts)
    else:
        good = _many(first, seeds, jobs, minutes, as_json=as_json)
    if not good:
        raise SystemExit(1)
