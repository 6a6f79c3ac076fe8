"""Many short lives of a whole cluster: whatever goes wrong, every job ends exactly once.

A seed that fails goes into FIRST_SEEDS with the reason and stays there.
"""

import pytest

from idl.records import CancelJob, DrainNode
from tests.scenarios.cluster import Cluster

SEEDS = 200
SEEDS_PER_TEST = 20
FIRST_SEEDS: tuple[int, ...] = ()
"""Seeds that ever failed (none of those tried at first did; more than 2,000 were)."""
JOBS = 24
ROUGH_MS = 12_000
CALM_MS = 180_000


def live(seed: int, coordinators: int = 3) -> Cluster:
    """One life: faults and work for a while, then calm until everything has ended."""
    cluster = Cluster(seed, coordinators)
    rng = cluster.rng
    start = cluster.now
    names = [f"job{number}" for number in range(JOBS)]
    for name in names:
        at = rng.randint(0, ROUGH_MS * 2 // 3)
        cluster.after(at, lambda name=name: cluster.submit(name, cluster.random_spec()))  # type: ignore[misc]
        if rng.random() < 0.1:  # submitted again: a duplicate
            cluster.after(at + 500, lambda name=name: cluster.submit(name, cluster.random_spec()))  # type: ignore[misc]
        if rng.random() < 0.15:
            later = at + rng.randint(0, 2_000)
            cluster.after(later, lambda name=name: cluster.command(CancelJob(job=name)))  # type: ignore[misc]
    cluster.after(rng.randint(0, 5_000), cluster.submit_poison)
    cluster.after(3_000, lambda: cluster.command(DrainNode(node="n2")))
    cluster.after(6_000, lambda: cluster.command(DrainNode(node="n2", drain=False)))
    for _ in range(rng.randint(2, 8)):
        cluster.after(rng.randint(600, ROUGH_MS), cluster.one_fault)
    cluster.run_until(start + ROUGH_MS)
    cluster.calm()
    cluster.run_until(start + ROUGH_MS + CALM_MS, done=lambda: at_rest(cluster, names))
    check_the_end(cluster, names)
    return cluster


def at_rest(cluster: Cluster, names: list[str]) -> bool:
    """Nothing is left to do, for the ledger and for every agent."""
    return (
        all(name in cluster.ends for name in names)
        and not cluster.auditor.dead_letters_due
        and not any(agent.runs for agent in cluster.agents.values() if agent.alive)
        and cluster.leader is not None
    )


def check_the_end(cluster: Cluster, names: list[str]) -> None:
    auditor = cluster.auditor
    missing = [name for name in names if name not in cluster.ends]
    assert not missing, (missing, [auditor.jobs[m].told() for m in missing if m in auditor.jobs])
    assert not auditor.jobs, "a job still lives"
    assert not auditor.dead_letters_due, "a dead letter was never stored"
    assert not any(agent.runs for agent in cluster.agents.values() if agent.alive), (
        "an agent still holds attempts"
    )
    dead = {name for name, ends in cluster.ends.items() if ends == ["DeadLettered"]}
    assert dead <= set(cluster.dead_letters), "a dead job has no dead letter"
    submitted = sum(
        len(records) for (topic, _), records in cluster.log.records.items() if "queue" in topic
    )
    counters = auditor.queues["default"]
    assert counters.ingested + counters.rejected == submitted, "a submission vanished"
    assert set(auditor.ended) == set(cluster.ends)


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_every_job_ends_exactly_once(first: int) -> None:
    for seed in (*FIRST_SEEDS, *range(first, first + SEEDS_PER_TEST)):
        try:
            live(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_one_coordinator_alone() -> None:
    for seed in range(1_000, 1_010):
        live(seed, coordinators=1)


def test_five_coordinators() -> None:
    for seed in range(2_000, 2_005):
        live(seed, coordinators=5)


def test_one_seed_is_one_history() -> None:
    first, second = live(7), live(7)
    assert first.log.ledger == second.log.ledger
    assert first.auditor.state_hash() == second.auditor.state_hash()
