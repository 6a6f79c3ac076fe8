"""What outlives one process of the agent, opened in order: state directory, journal, launcher."""

import argparse
import re
import time
from typing import NamedTuple

from idl.errors import PlatformFaultError
from idl.settings import ClusterSettings
from idl.units import parse_bytes, parse_ms
from node_agent.core.images import parse_images
from node_agent.core.journal import Origin
from node_agent.core.recovery import sandbox_key
from node_agent.images.bounds import IMAGE_BYTES_MAX
from node_agent.images.offer import ImageBounds, NodeImages
from node_agent.journal import Journal
from node_agent.keeper import LauncherKeeper
from node_agent.sandbox.plan import SandboxUnavailable
from node_agent.sandbox.settings import VISIBLE_PATHS, Backend, SandboxSettings, interpreter_paths
from node_agent.state import StateDir, boot_id, state_path


class Kept(NamedTuple):
    """What outlives one process of the agent, opened. `adopted`: the launcher was there before."""

    state: StateDir
    journal: Journal
    keeper: LauncherKeeper
    images: NodeImages
    adopted: bool

    async def close(self) -> None:
        """The launcher ends, unless jobs were left to it."""
        await self.keeper.close()
        self.journal.close()
        self.state.close()


def sandbox_settings(
    settings: ClusterSettings,
    node: str,
    devices: tuple[str, ...],
    orphan_grace_s: float,
    allow_host_network: bool = False,
    mounts: tuple[str, ...] = (),
    backend: Backend = "native",
    image_paths: tuple[str, ...] = (),
) -> SandboxSettings:
    """This agent's sandboxes: jobs may also run the interpreter that runs the agent.

    `mounts`: host paths that GPUs need (CDI), shown read-only unless they are seen anyway.
    """
    seen = tuple(f"{path}/" for path in VISIBLE_PATHS)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{settings.cluster}-{node}")
    return SandboxSettings(
        backend=backend,
        instance=name,
        extra_ro_paths=(
            *interpreter_paths(),
            *(path for path in mounts if not path.startswith(seen)),
        ),
        devices=devices,
        image_paths=image_paths,
        orphan_grace_s=orphan_grace_s,
        allow_host_network=allow_host_network,
    )


async def open_kept(
    settings: ClusterSettings,
    options: argparse.Namespace,
    devices: tuple[str, ...],
    mounts: tuple[str, ...] = (),
) -> Kept:
    """State directory, journal, launcher. Raises ConfigError, PlatformFaultError."""
    node = options.name
    grace_s = parse_ms(options.orphan_grace) / 1000
    state = StateDir(state_path(options.config, settings.state_dir, options.state_dir, node))
    try:
        scope = f"{settings.cluster}/{settings.kafka.prefix}{settings.pool}"
        origin = Origin(scope, node, boot_id(), time.time_ns())
        journal = Journal(state.journal, origin)
        state.tidy({sandbox_key(*k) for k, e in journal.state.entries.items() if not e.delivered})
        images = _images(settings, options, state)
        sandboxes = sandbox_settings(
            settings, node, devices, grace_s, options.allow_host_network, mounts, options.sandbox,
            images.paths,
        )  # fmt: skip
        keeper, adopted = await LauncherKeeper.open(sandboxes, state.path)
    except SandboxUnavailable as error:
        state.close()
        raise PlatformFaultError(str(error)) from error
    except BaseException:
        state.close()
        raise
    return Kept(state, journal, keeper, images, adopted)


def _images(settings: ClusterSettings, options: argparse.Namespace, state: StateDir) -> NodeImages:
    sources = parse_images(settings.images, options.image)
    bounds = ImageBounds(
        bytes_max=parse_bytes(options.image_bytes) if options.image_bytes else IMAGE_BYTES_MAX,
        files_max=options.image_files,
    )
    return NodeImages(sources, state.path, bounds)
