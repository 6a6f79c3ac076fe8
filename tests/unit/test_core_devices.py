"""Devices chosen on the machines of public reports: links, domains, least damage, cores."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.core.devices import Linkage, choose_cores, choose_gpus
from controlplane.core.scheduler import Placement, Scheduler
from dataplane.core.devices import Held, Machine
from dataplane.core.explain import explain
from dataplane.core.snapshot import image_of, restored
from idl import ledger as d
from idl.control import AssignIntent
from idl.jobs import JobSpec, Resources
from idl.topology import GpuShare, Topology
from tests.unit.core_builders import MIB, Hand, Story
from tests.unit.machines import machine, node_like

GIB = 1024 * MIB
CORES = {"cpu_pinning": "cores"}
SINGLE = {"numa": "single"}


def _finished(story: Story, job: str) -> tuple[Any, ...]:
    return (d.Finished(job=job, attempt=story.state.jobs[job].attempt),)


def linkage(profile: str) -> Linkage:
    parts = machine(profile).parts
    return Linkage(Machine(parts, [gpu.index for gpu in parts.gpus]))


def pick(profile: str, count: int, free: range | tuple[int, ...], links: str = "any") -> Any:
    return choose_gpus(linkage(profile), tuple(free), free, count, links)


def asks(job: str, **resources: Any) -> JobSpec:
    given = {"cpu_millis": 1000, "memory_bytes": 256 * MIB, **resources}
    return JobSpec(id=job, command=("true",), resources=Resources(**given))


def placed(story: Story, *specs: JobSpec) -> dict[str, Placement]:
    """Plans what is pending and applies it: the fold checks every grant."""
    story.ingest(*specs)
    plan = Scheduler().plan(story.state, 100)
    for placement in plan:
        story.place(placement)
    return {placement.job: placement for placement in plan}


# --- GPUs -------------------------------------------------------------------------------------


def test_the_hybrid_cube_mesh() -> None:
    mesh = linkage("v100-cube-mesh")
    two_links, one_link, none = (mesh.score(frozenset(p)) for p in ((0, 2), (0, 1), (0, 4)))
    assert two_links > one_link > none
    assert pick("v100-cube-mesh", 2, (0, 1, 2, 4)) == (0, 2)
    assert pick("v100-cube-mesh", 2, (0, 1, 4)) == (0, 1)
    assert pick("v100-cube-mesh", 4, range(8)) == (0, 1, 2, 3)
    assert mesh.score(frozenset({0, 1, 2, 3}))[0] == 9
    assert pick("v100-cube-mesh", 4, range(1, 8)) == (4, 5, 6, 7)
    assert pick("v100-cube-mesh", 8, range(8)) == tuple(range(8))


def test_a_pair_is_taken_where_it_leaves_the_best_rest() -> None:
    """Of the pairs with two links in one domain, 0+2 leaves {1, 3} linked twice and {4..7}."""
    first = pick("v100-cube-mesh", 2, range(8))
    rest = tuple(i for i in range(8) if i not in first)
    assert linkage("v100-cube-mesh").score(frozenset(first))[:2] == (2, -1)
    assert pick("v100-cube-mesh", 4, rest) in ((0, 1, 2, 3), (4, 5, 6, 7))


def test_single_gpus_fill_what_is_broken_already() -> None:
    assert pick("dgx-a100", 1, range(8)) == (0,)
    assert pick("dgx-a100", 1, range(1, 8)) == (1,), "its partner is gone: 1 spoils no pair"
    assert pick("dgx-a100", 2, range(1, 8)) == (2, 3)
    assert pick("hgx-h100", 1, (1, 2, 3, 4, 5, 6, 7))[0] in (1, 2, 3)
    assert pick("dgx-2", 1, range(1, 16))[0] < 8, "the whole domain stays whole"
    assert pick("dgx-2", 8, range(1, 16)) == tuple(range(8, 16))


def test_pcie_ways_decide_where_there_are_no_links() -> None:
    assert pick("l40s-pcie", 2, (0, 2, 3, 5)) == (2, 3)
    assert pick("l40s-pcie", 2, (0, 2, 5)) == (0, 2), "NODE before SYS"
    assert pick("l40s-pcie", 2, (0, 2, 5), "nvlink") == ()
    assert pick("workstation-5090", 2, (0, 1)) == (0, 1)


def test_wanting_nvlink_wants_them_connected() -> None:
    assert pick("v100-cube-mesh", 2, (0, 4), "nvlink") == ()
    assert pick("v100-cube-mesh", 3, (0, 4, 7), "nvlink") == (0, 4, 7), "7 is the bridge"


sizes = st.integers(2, 6)


@st.composite
def made_up_machines(draw: st.DrawFn) -> tuple[Topology, tuple[int, ...], int]:
    from idl.topology import GpuInfo, NumaInfo

    size = draw(sizes)
    links = [[0] * size for _ in range(size)]
    levels = [[0] * size for _ in range(size)]
    for a, b in combinations(range(size), 2):
        links[a][b] = links[b][a] = draw(st.integers(0, 2))
        levels[a][b] = levels[b][a] = draw(st.sampled_from((10, 20, 40, 50)))
    gpus = tuple(
        GpuInfo(index=i, uuid=f"g{i}", numa_node=draw(st.integers(0, 1))) for i in range(size)
    )
    topology = Topology(
        numa=tuple(NumaInfo(id=i, cpus=str(i), memory_bytes=1, cores=((i,),)) for i in (0, 1)),
        gpus=gpus,
        nvlinks=tuple(map(tuple, links)),
        pcie=tuple(map(tuple, levels)),
    )
    free = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return topology, tuple(sorted(free)), draw(st.integers(1, size))


def naive(topology: Topology, free: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Every set, judged from scratch by the words of the module."""

    def score(gpus: tuple[int, ...]) -> tuple[int, ...]:
        pairs = [(a, b) for a in gpus for b in gpus if a < b]
        links = [topology.nvlinks[a][b] for a, b in pairs]
        return (
            sum(links), -len({topology.gpus[i].numa_node for i in gpus}),
            min(links) if links else 0, -sum(topology.pcie[a][b] for a, b in pairs),
        )  # fmt: skip

    def best(size: int, rest: tuple[int, ...]) -> tuple[int, ...]:
        return max((score(one) for one in combinations(rest, size)), default=(-1, 0, 0, 0))

    def worth(gpus: tuple[int, ...]) -> tuple[Any, ...]:
        rest = tuple(i for i in free if i not in gpus)
        useful = (best(8, rest), best(4, rest), best(2, rest), score(rest))
        return score(gpus), useful, tuple(-i for i in gpus)

    return max(combinations(free, count), key=worth, default=())


@given(made_up_machines())
@settings(max_examples=150, deadline=None)
def test_the_choice_is_the_one_of_brute_force(
    given_machine: tuple[Topology, tuple[int, ...], int],
) -> None:
    topology, free, count = given_machine
    graph = Linkage(Machine(topology, range(len(topology.gpus))))
    assert choose_gpus(graph, free, free, count, "any") == naive(topology, free, count)


# --- whole jobs on whole machines -------------------------------------------------------------


def test_gpus_cores_and_memory_of_one_domain() -> None:
    story = Story().add(node_like("dgx-a100"))
    plan = placed(story, asks("a", cpu_millis=8000, gpus=2, **CORES, **SINGLE))
    grant = plan["a"].grant
    assert (grant.gpus, grant.mems) == ((2, 3), (1,)), "the pair of the lowest domain"
    assert grant.cpus == (16, 17, 18, 19, 144, 145, 146, 147), "one L3: four whole cores"
    held = story.state.nodes["n1"].attempts["a"]
    assert held.cpu_millis == 8000


def test_cores_are_near_the_gpus_without_being_bound() -> None:
    story = Story().add(node_like("hgx-h100"))
    first = placed(story, asks("a", cpu_millis=4000, gpus=4, **CORES))["a"].grant
    second = placed(story, asks("b", cpu_millis=4000, gpus=4, **CORES))["b"].grant
    assert (first.gpus, first.cpus, first.mems) == ((0, 1, 2, 3), (0, 1, 96, 97), ())
    assert (second.gpus, second.cpus) == ((4, 5, 6, 7), (48, 49, 144, 145))


def test_a_core_given_whole_is_taken_whole() -> None:
    story = Story().add(node_like("workstation-5090"))
    plan = placed(story, *(asks(f"j{n}", **CORES) for n in range(20)))
    assert len(plan) == 16, "one CPU of a core with two threads takes both"
    assert story.state.nodes["n1"].free_cpu_millis == 0
    story.state.check_invariants()


def test_pinned_cores_come_from_one_l3_if_one_has_enough() -> None:
    found = machine("workstation-5090").parts
    made = Machine(found, ())
    assert choose_cores(made, Held(), 4, []) == (0, 1, 16, 17)
    held = Held()
    held.cpus = set(range(6)) | set(range(16, 22))
    assert choose_cores(made, held, 4, []) == (6, 7, 22, 23), "two cores left in the first L3"
    assert choose_cores(made, held, 6, []) == (8, 9, 10, 24, 25, 26)
    assert choose_cores(made, held, 64, []) == ()


def test_mig_instances_by_profile() -> None:
    story = Story().add(node_like("a100-mig"))
    plan = placed(
        story, *(asks(f"small{n}", gpus=1, gpu_profile="1g.5gb") for n in range(3)),
        asks("large", gpus=1, gpu_profile="3G.20GB"), asks("whole", gpus=1),
    )  # fmt: skip
    assert plan.keys() == {"small0", "small1", "large"}
    parts = {part.uuid: part for part in machine("a100-mig").parts.gpus[0].mig}
    profiles = [parts[plan[j].grant.mig[0]].profile for j in ("small0", "small1", "large")]
    assert profiles == ["1g.5gb", "1g.5gb", "3g.20gb"]
    assert plan["small0"].grant.mig != plan["small1"].grant.mig
    assert explain(story.state, "whole", 0).code == "NoMatchingNode", "the GPU is divided"
    assert "in use by others: 1 MIG" in explain(story.state, "small2", 0).nodes[0].why


def test_shares_fill_one_gpu_before_the_next() -> None:
    story = Story().add(node_like("workstation-5090"))
    plan = placed(
        story, asks("a", gpu_share_millis=500), asks("b", gpu_share_memory_bytes=8 * GIB),
        asks("c", gpu_share_millis=300), asks("d", gpu_share_millis=250),
        asks("e", gpus=2), asks("f", gpus=1),
    )  # fmt: skip
    assert plan["a"].grant.share == GpuShare(gpu=0, millis=500, memory_bytes=16 * GIB)
    assert plan["b"].grant.share == GpuShare(gpu=0, millis=250, memory_bytes=8 * GIB)
    assert plan["c"].grant.share.gpu == 1, "250 thousandths were left of GPU 0"  # type: ignore[union-attr]
    assert plan["d"].grant.share.gpu == 0  # type: ignore[union-attr]
    assert plan.keys() == {"a", "b", "c", "d"}, "no GPU is whole any more"
    story.state.check_invariants()


def test_model_and_memory_choose_the_node() -> None:
    story = Story().add(node_like("t4-pcie", "t"), node_like("l40s-pcie", "l"))
    plan = placed(
        story, asks("a", gpus=1, gpu_model="l40s"), asks("b", gpus=1, gpu_memory_bytes_min=GIB),
        asks("c", gpus=1, gpu_memory_bytes_min=17 * GIB), asks("d", gpus=1, gpu_model="H100"),
    )  # fmt: skip
    assert {job: p.node for job, p in plan.items()} == {"a": "l", "b": "l", "c": "l"}
    assert "GPUs of model 'h100'" in explain(story.state, "d", 0).message


@pytest.mark.parametrize(
    ("profile", "resources", "reason"),
    [
        ("t4-pcie", {"gpus": 1, "gpu_model": "A100"}, "no node offers 1 GPUs of model 'a100'"),
        ("t4-pcie", {"gpus": 1, "gpu_memory_bytes_min": 40 * GIB},
         "no node offers 1 GPUs with 40Gi of memory each"),
        ("t4-pcie", {"gpus": 2, "gpu_links": "nvlink"},
         "no node offers 2 GPUs connected by NVLink"),
        ("t4-pcie", {"gpus": 9}, "no node offers 9 GPUs"),
        ("t4-pcie", {"gpus": 5, **SINGLE},
         "no node offers 1 CPUs, its memory and 5 GPUs in one NUMA domain"),
        ("dgx-a100", {"cpu_millis": 33_000, **SINGLE},
         "no node offers 33 CPUs, its memory in one NUMA domain"),
        ("dgx-a100", {"gpus": 1, "gpu_profile": "1g.5gb"},
         "no node offers 1 MIG instances of profile 1g.5gb"),
        ("t4-pcie", {"gpu_share_memory_bytes": 17 * GIB},
         "no node offers a share of one GPU (?/1000, 17Gi)"),
    ],
)  # fmt: skip
def test_why_names_the_constraint(profile: str, resources: dict[str, Any], reason: str) -> None:
    story = Story().add(node_like(profile)).ingest(asks("a", **resources))
    assert Scheduler().plan(story.state, 1) == []
    found = explain(story.state, "a", 0)
    assert (found.code, found.message) == ("NoMatchingNode", reason)


def test_free_in_sum_but_not_in_one_place_is_said() -> None:
    story = Story().add(node_like("hgx-h100"))
    placed(story, asks("a", gpus=3, **SINGLE), asks("b", gpus=3, **SINGLE))
    assert story.state.nodes["n1"].free_gpus == (3, 7)
    story.ingest(asks("late", gpus=2, **SINGLE))
    found = explain(story.state, "late", 0)
    assert found.code == "WaitingForResources"
    assert found.nodes[0].why == (
        "in use by others: one NUMA domain (free in sum, not in one place)"
    )
    assert found.nodes[0].node == "n1 (simulated hgx-h100)"


def test_intents_carry_the_grant_and_keep_others_off_pinned_cores() -> None:
    hand = Hand()
    hand.node(node_like("workstation-5090"))
    hand.submit(asks("before"))
    hand.submit(asks("pinned", cpu_millis=4000, gpus=1, **CORES))
    hand.submit(asks("after"), asks("bound", **SINGLE))
    told = {item.job: item for item in hand.intents() if isinstance(item, AssignIntent)}
    assert told["pinned"].cpus == (0, 1, 16, 17) and told["pinned"].gpus == (0,)
    assert told["before"].cpus == ()
    others = tuple(cpu for cpu in range(32) if cpu not in (0, 1, 16, 17))
    assert told["after"].cpus == others and told["after"].mems == ()
    assert told["bound"].cpus == others and told["bound"].mems == (0,)


def test_a_gpu_that_falls_ill_is_given_to_nobody_and_its_job_runs_on() -> None:
    parts = machine("workstation-5090").parts
    ill = replace(parts, gpus=(replace(parts.gpus[0], unhealthy="Xid 79"), parts.gpus[1]))
    story = Story().add(node_like("workstation-5090"))
    placed(story, asks("a", gpus=1), asks("s", gpu_share_millis=100))
    story.add(node_like("workstation-5090", parts=ill))
    assert story.state.nodes["n1"].attempts.keys() == {"a", "s"}
    assert placed(story, asks("b", gpus=1)) == {}
    assert explain(story.state, "b", 0).code == "WaitingForResources"
    story.release("s", *_finished(story, "s"))
    assert Scheduler().plan(story.state, 9)[0].gpus == (1,)


def test_a_snapshot_holds_the_devices() -> None:
    story = Story().add(node_like("a100-mig"), node_like("hgx-h100", "n2"))
    placed(
        story, asks("m", gpus=1, gpu_profile="1g.5gb"), asks("s", gpu_share_millis=300),
        asks("c", cpu_millis=2000, **CORES, **SINGLE),
    )  # fmt: skip
    again = restored(image_of(story.state))
    again.check_invariants()
    assert again.state_hash() == story.state.state_hash()
    for name, node in story.state.nodes.items():
        assert again.nodes[name].held.content() == node.held.content()
        assert again.nodes[name].free_gpus == node.free_gpus


def test_whole_cores_that_need_more_cpu_time_than_is_left_are_told() -> None:
    """96 CPUs, two threads a core: a job for one gets two, and one is left."""
    story = Story().add(node_like("v100-cube-mesh"))
    plan = placed(
        story, asks("a", cpu_millis=48_000), asks("b", cpu_millis=47_000),
        asks("c", cpu_millis=1000, **CORES),
    )  # fmt: skip
    assert set(plan) == {"a", "b"}
    found = explain(story.state, "c", 0)
    assert found.code == "WaitingForResources"
    assert found.nodes[0].why == "in use by others: whole cores (free in sum, not in one place)"


def test_a_node_with_less_cpu_time_than_one_whole_core_never_takes_one() -> None:
    node = node_like("v100-cube-mesh")
    small = replace(node, capacity=replace(node.capacity, cpu_millis=1000))
    story = Story().add(small)
    assert placed(story, asks("c", cpu_millis=1000, **CORES)) == {}
    assert explain(story.state, "c", 0).code == "NoMatchingNode"


PROFILES = ("v100-cube-mesh", "dgx-a100", "workstation-5090", "a100-mig", "l40s-pcie", "gb200")
wishes = st.fixed_dictionaries(
    {
        "cpu_millis": st.sampled_from((1000, 4000, 16_000, 48_000)),
        "memory_bytes": st.sampled_from((GIB, 64 * GIB)),
        "cpu_pinning": st.sampled_from(("shared", "cores")),
        "numa": st.sampled_from(("any", "single")),
    }
)
gpu_wishes = st.one_of(
    st.fixed_dictionaries(
        {"gpus": st.integers(0, 5), "gpu_links": st.sampled_from(("any", "nvlink"))}
    ),
    st.fixed_dictionaries({"gpus": st.integers(1, 2), "gpu_profile": st.just("1g.5gb")}),
    st.fixed_dictionaries({"gpu_share_millis": st.sampled_from((100, 400, 1000))}),
    st.fixed_dictionaries({"gpu_share_memory_bytes": st.sampled_from((GIB, 12 * GIB))}),
)


@given(st.sampled_from(PROFILES), st.lists(st.tuples(wishes, gpu_wishes), max_size=14))
@settings(max_examples=80, deadline=None)
def test_what_the_scheduler_gives_fits_and_what_it_refuses_is_explained(
    profile: str, wanted: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """The fold checks every grant; a job that stays has a reason on the only node."""
    story = Story().add(node_like(profile))
    specs = [asks(f"j{n}", **plain, **gpus) for n, (plain, gpus) in enumerate(wanted)]
    plan = placed(story, *specs) if specs else {}
    for one in specs:
        if one.id not in plan:
            found = explain(story.state, one.id, 0)
            assert found.code in ("NoMatchingNode", "WaitingForResources"), (one, found)
            assert found.nodes[0].why
