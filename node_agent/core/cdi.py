"""Container Device Interface: what a spec file says a device needs, and what of it we apply. Pure.

Applied: device nodes below /dev, mounts (always read-only, at the place they have on the host),
environment. Hooks run on the host for a container that a job controls (CVE-2025-23266), so only
those of an allow-list are handed on; by default none is. What is not applied is said in a note.
Source: the CDI specification, versions 0.3 to 1.x.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from idl.errors import ConfigError

GPU_KIND: Final = "nvidia.com/gpu"
VERSIONS: Final = ("0.3.", "0.4.", "0.5.", "0.6.", "0.7.", "0.8.", "1.")


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    pass


class DeviceNode(_Part, frozen=True, kw_only=True, rename="camel"):
    """One node; `host_path` where it differs on the host."""

    path: str
    host_path: str = ""


class Mount(_Part, frozen=True, kw_only=True, rename="camel"):
    """One bind mount."""

    host_path: str
    container_path: str
    options: tuple[str, ...] = ()


class Hook(_Part, frozen=True, kw_only=True, rename="camel"):
    """One program of the host."""

    hook_name: str
    path: str
    args: tuple[str, ...] = ()


class Edits(_Part, frozen=True, kw_only=True, rename="camel"):
    """What a container gets."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Hook, ...] = ()


class Device(_Part, frozen=True, kw_only=True, rename="camel"):
    """One device by its name in the spec: an index, a UUID, `all`."""

    name: str
    container_edits: Edits = Edits()


class Spec(_Part, frozen=True, kw_only=True, rename="camel"):
    """One file."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...] = ()
    container_edits: Edits = Edits()


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What one device needs of us. `hooks`: those of the allow-list. `notes`: what is left out."""

    nodes: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    env: dict[str, str] = {}
    hooks: tuple[Hook, ...] = ()
    notes: tuple[str, ...] = ()


def parse_spec(document: object, origin: str) -> Spec:
    """Raises ConfigError: one line that names the file and what is wrong with it."""
    try:
        spec = msgspec.convert(document, Spec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"CDI spec {origin} is ignored: {error}") from error
    if not spec.cdi_version.startswith(VERSIONS):
        raise ConfigError(
            f"CDI spec {origin} is ignored: version {spec.cdi_version} is not known (0.3 to 1.x)"
        )
    vendor, slash, kind = spec.kind.partition("/")
    if not (vendor and slash and kind):
        raise ConfigError(f"CDI spec {origin} is ignored: kind {spec.kind!r} is not VENDOR/CLASS")
    return spec


def applied(
    specs: Iterable[Spec], names: Iterable[str], hooks_allowed: frozenset[str] = frozenset()
) -> Applied | None:
    """The edits for the GPU that some spec knows by one of `names`; None where none does.

    Of specs that know it the last counts: the caller orders them by priority.
    """
    wanted = frozenset(names)
    found: tuple[Spec, Device] | None = None
    for spec in specs:
        if spec.kind == GPU_KIND:
            for device in spec.devices:
                if device.name in wanted:
                    found = (spec, device)
    if found is None:
        return None
    spec, device = found
    return _apply((spec.container_edits, device.container_edits), hooks_allowed)


def _apply(edits: tuple[Edits, ...], hooks_allowed: frozenset[str]) -> Applied:
    notes: dict[str, None] = {}
    nodes: dict[str, None] = {}
    mounts: dict[str, None] = {}
    hooks = []
    env: dict[str, str] = {}
    for edit in edits:
        for node in edit.device_nodes:
            if _is_place(node.path, "/dev/") and node.host_path in ("", node.path):
                nodes[node.path] = None
            else:
                notes[f"device node {node.path} is not below /dev at its own place"] = None
        for mount in edit.mounts:
            if mount.host_path == mount.container_path and _is_place(mount.host_path, "/"):
                mounts[mount.host_path] = None
            else:
                notes[f"mount {mount.host_path} elsewhere ({mount.container_path})"] = None
        for hook in edit.hooks:
            if hook.path in hooks_allowed:
                hooks.append(hook)
            else:
                notes[f"hook {hook.path} ({hook.hook_name}) is not on the allow-list"] = None
        env.update(word.partition("=")[::2] for word in edit.env if "=" in word)
    return Applied(
        nodes=tuple(nodes), mounts=tuple(mounts), env=env, hooks=tuple(hooks), notes=tuple(notes)
    )


def _is_place(path: str, below: str) -> bool:
    """An absolute path that names one place: no `..`, nothing doubled."""
    parts = path.split("/")[1:]
    return (
        path.startswith(below)
        and len(path) > len(below)
        and all(part not in ("", ".", "..") for part in parts)
        and "\0" not in path
    )
