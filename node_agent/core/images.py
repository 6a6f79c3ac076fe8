"""What operators write about images, and what an image is to a job's plan. Pure."""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from idl.errors import ConfigError
from idl.ids import is_valid_name

DIRECTORY: Final = "directory"
"""Reported in place of a digest for an operator's own directory, which has none."""
_HOW: Final = "write NAME=dir:/PATH, or NAME=oci:/PATH/OF/LAYOUT or NAME=oci:/PATH/OF/LAYOUT:REF"


class ImageSource(msgspec.Struct, frozen=True):
    """Where an image comes from: a directory that is a root, or an OCI layout and a name in it."""

    kind: Literal["dir", "oci"]
    path: str
    ref: str = ""


class ReadyImage(msgspec.Struct, frozen=True):
    """An image that jobs may have. `root`: the host directory. `env`: defaults of its jobs."""

    name: str
    root: str
    digest: str = DIRECTORY
    env: dict[str, str] = {}


def parse_image(text: str) -> tuple[str, ImageSource]:
    """`NAME=dir:/path`, `NAME=oci:/path[:ref]`; a path has no colon. Raises ConfigError."""
    name, _, source = text.partition("=")
    return name, parse_source(name, source)


def parse_source(name: str, text: str) -> ImageSource:
    """What follows the name. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    path, colon, ref = rest.partition(":")
    if not is_valid_name(name):
        raise ConfigError(f"image name {name!r} is not a name (letters, digits, . _ -); {_HOW}")
    if not path.startswith("/"):
        raise ConfigError(f"image {name}: {text!r} names no absolute path; {_HOW}")
    if kind == "dir" and not colon:
        return ImageSource("dir", path)
    if kind == "oci" and bool(colon) == bool(ref):
        return ImageSource("oci", path, ref)
    raise ConfigError(f"image {name}: {text!r} is not understood; {_HOW}")


def parse_images(of_cluster: Mapping[str, str], options: list[str]) -> dict[str, ImageSource]:
    """The cluster file's, and over them those of the command line. Raises ConfigError."""
    shared = {name: parse_source(name, text) for name, text in of_cluster.items()}
    own: dict[str, ImageSource] = {}
    for text in options:
        name, source = parse_image(text)
        if name in own:
            raise ConfigError(f"image {name} is given twice")
        own[name] = source
    return shared | own
