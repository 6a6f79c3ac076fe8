"""CDI spec files of this machine: read, judged, and applied to the GPUs that are offered."""

import json
import logging
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import yaml

from idl.errors import ConfigError
from idl.topology import Topology
from node_agent.core import cdi

CDI_DIRS: Final = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""The specification's places; the later one counts where both know a device."""
SPEC_BYTES_MAX: Final = 4 * 1024 * 1024
"""A spec of a machine with 16 GPUs in MIG parts has some hundred kilobytes."""

log = logging.getLogger("cdi")


class CdiDevices(msgspec.Struct, frozen=True):
    """What specs say, by index of the GPU or UUID of the MIG instance."""

    found: dict[int | str, cdi.Applied] = {}
    notes: tuple[str, ...] = ()

    @property
    def mounts(self) -> tuple[str, ...]:
        """Host paths that jobs with GPUs need to see, those that exist."""
        paths = {path: None for one in self.found.values() for path in one.mounts}
        return tuple(path for path in paths if Path(path).exists())


def read_specs(folders: Iterable[Path]) -> tuple[list[cdi.Spec], list[str]]:
    """Specs in rising priority, and a line for each file that is no good."""
    specs, problems = [], []
    for folder in folders:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        for file in files:
            if file.suffix in (".json", ".yaml", ".yml"):
                try:
                    specs.append(_read(file))
                except ConfigError as error:
                    problems.append(str(error))
    return specs, problems


def _read(file: Path) -> cdi.Spec:
    try:
        facts = file.stat()
        foreign = stat.S_IWOTH | (stat.S_IWGRP if facts.st_gid else 0)
        if facts.st_mode & foreign:
            raise ConfigError(f"CDI spec {file} is ignored: others may write it; chmod go-w")
        if facts.st_size > SPEC_BYTES_MAX:
            raise ConfigError(f"CDI spec {file} is ignored: {facts.st_size} bytes are too many")
        text = file.read_text(encoding="utf-8")
        document = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"CDI spec {file} is ignored: {why}") from error
    return cdi.parse_spec(document, str(file))


def read_cdi(
    topology: Topology,
    folders: Iterable[Path] = CDI_DIRS,
    hooks_allowed: frozenset[str] = frozenset(),
) -> CdiDevices:
    """What the specs of this machine say about its GPUs; what is not applied is logged once."""
    specs, problems = read_specs(folders)
    names: dict[int | str, tuple[str, ...]] = {
        gpu.index: (str(gpu.index), gpu.uuid, f"gpu{gpu.index}") for gpu in topology.gpus
    }
    for gpu in topology.gpus:
        names |= {
            part.uuid: (part.uuid, f"{gpu.index}:{at}", f"mig{gpu.index}:{at}")
            for at, part in enumerate(gpu.mig)
        }
    judged = {key: cdi.applied(specs, known, hooks_allowed) for key, known in names.items()}
    found = {key: one for key, one in judged.items() if one is not None}
    left_out = dict.fromkeys(note for one in found.values() for note in one.notes)
    notes = (*problems, *(f"CDI: not applied: {note}" for note in left_out))
    for note in notes:
        log.warning("CDI", extra={"reason": note})
    return CdiDevices(found, notes)
