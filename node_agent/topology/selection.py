"""Which part of a machine an agent offers: several agents on one host must not offer it twice.

`all`, `none`, a list (indices or UUIDs of GPUs, a CPU list), or `K/N`: the K-th of N equal parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from msgspec.structs import replace

from idl.errors import ConfigError
from idl.topology import Matrix, NumaInfo, Topology, format_cpu_list, parse_cpu_list

_T = TypeVar("_T")
_PART = re.compile(r"(\d+)/(\d+)")


def _part(text: str, everything: Sequence[_T], option: str) -> Sequence[_T] | None:
    """The K-th of N parts; None where `text` is not of that form. Raises ConfigError."""
    match = _PART.fullmatch(text)
    if match is None:
        return None
    part, count = int(match[1]), int(match[2])
    if not 1 <= part <= count:
        raise ConfigError(f"{option} {text}: the first number is 1 to {count}")
    size = len(everything)
    return everything[size * (part - 1) // count : size * part // count]


def select_gpus(topology: Topology, text: str) -> Topology:
    """`topology` with the GPUs of option `--gpus` only. Raises ConfigError."""
    if text in ("", "all"):
        return topology
    known = [gpu.index for gpu in topology.gpus]
    wanted = [] if text == "none" else _part(text, known, "--gpus")
    if wanted is None:
        wanted = [_gpu(topology, word.strip()) for word in text.split(",")]
    places = [at for at, gpu in enumerate(topology.gpus) if gpu.index in set(wanted)]
    note = topology.gpu_note or ("" if places or not known else f"none is offered (--gpus {text})")
    return replace(
        topology,
        gpus=tuple(topology.gpus[at] for at in places),
        nvlinks=_cut(topology.nvlinks, places),
        pcie=_cut(topology.pcie, places),
        nics=tuple(
            replace(nic, levels=tuple(nic.levels[at] for at in places if at < len(nic.levels)))
            for nic in topology.nics
        ),
        gpu_note=note,
    )


def _cut(matrix: Matrix, places: Sequence[int]) -> Matrix:
    return tuple(tuple(matrix[row][column] for column in places) for row in places if matrix)


def _gpu(topology: Topology, word: str) -> int:
    for gpu in topology.gpus:
        if word in (str(gpu.index), gpu.uuid):
            return gpu.index
    there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in topology.gpus) or "none"
    raise ConfigError(f"--gpus: no GPU {word!r} here; there: {there}")


def select_cpus(topology: Topology, text: str) -> Topology:
    """`topology` with the CPUs of option `--cpus` only, cut to whole cores. Raises ConfigError."""
    if text in ("", "all"):
        return topology
    cores = [core for domain in topology.numa for core in domain.cores]
    wanted = _part(text, cores, "--cpus")
    if wanted is None:
        allowed = set(() if text == "none" else _cpus(text))
        wanted = [core for core in cores if set(core) <= allowed]
    return replace(topology, numa=tuple(_only(domain, wanted) for domain in topology.numa))


def _cpus(text: str) -> tuple[int, ...]:
    try:
        return parse_cpu_list(text)
    except ValueError as error:
        raise ConfigError(f"--cpus {text!r} is not a CPU list such as 0-3,8") from error


def _only(domain: NumaInfo, cores: Sequence[tuple[int, ...]]) -> NumaInfo:
    kept = tuple(core for core in domain.cores if core in cores)
    return replace(domain, cores=kept, cpus=format_cpu_list(cpu for core in kept for cpu in core))


def share_of_memory(topology: Topology, share: float) -> Topology:
    """`topology` where every domain has this share of its memory: the node offers no more."""
    if share >= 1:
        return topology
    domains = tuple(
        replace(domain, memory_bytes=int(domain.memory_bytes * share)) for domain in topology.numa
    )
    return replace(topology, numa=domains)
