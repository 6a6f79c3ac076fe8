"""Bounds of an image and its unpacking, each with its reason, and what exceeds them."""

from __future__ import annotations

import os
from typing import Final

from idl.units import GIB, KIB, MIB, format_bytes

IMAGE_BYTES_MAX: Final = 32 * GIB
"""All layers of an image, unpacked: what a CUDA image with a framework takes, twice."""
IMAGE_FILES_MAX: Final = 1_000_000
"""Entries of all its layers: a large image has 300,000; each is an inode and some memory."""
FREE_BYTES_KEPT: Final = 512 * MIB
"""Left on the disk of the state directory, so that an image cannot make the node drain."""
LOOK_AT_DISK_BYTES: Final = 64 * MIB
"""Between two looks at how much is free."""
LAYERS_MAX: Final = 256
"""Builders make at most 127."""
DOCUMENT_BYTES_MAX: Final = 4 * MIB
"""Of an index, a manifest, a config: what the image specification tells registries to take."""
DOCUMENTS_MAX: Final = 64
"""Indexes looked into; more is a maze, not an image."""
INDEX_DEPTH_MAX: Final = 4
"""An index of indexes of manifests has three levels."""
HEADER_BYTES_MAX: Final = 1 * MIB
"""One extended header of a tar entry: names and attributes; it is held in memory."""
DEPTH_MAX: Final = 100
"""Folders in each other: every one is an open file while a tree is removed."""
ENV_BYTES_MAX: Final = 32 * KIB
"""The image's environment: a third of what a command and its environment may have."""
MEMORY_BYTES_MAX: Final = 1 * GIB
"""Address space of the process that unpacks: it needs a tenth of it, whatever the image says."""
UNPACK_TIMEOUT_S: Final = 3_600.0
"""A day's work for no image; one that takes longer is stuck or hostile."""
NICE: Final = 10
"""Unpacking competes with jobs, and can wait."""


class ImageRefusedError(Exception):
    """This image cannot be offered; the message says why."""


class Budget:
    """What an image may still use. Spending more raises ImageRefusedError."""

    def __init__(self, bytes_max: int, files_max: int, folder: str = "", free_min: int = 0) -> None:
        """`folder`: where it is unpacked to; its disk keeps `free_min` bytes free."""
        self.bytes_max, self.files_max = bytes_max, files_max
        self.bytes = self.files = 0
        self._folder, self._free_min = folder, free_min
        self._look_at = 0

    def another(self) -> Budget:
        """The same bounds, nothing spent."""
        return Budget(self.bytes_max, self.files_max, self._folder, self._free_min)

    def spend_bytes(self, count: int) -> None:
        """Bytes of layers, unpacked."""
        self.bytes += count
        if self.bytes > self.bytes_max:
            most = format_bytes(self.bytes_max)
            raise ImageRefusedError(f"its layers unpack to more than {most} (--image-bytes)")
        if self._folder and self.bytes >= self._look_at:
            self._look_at = self.bytes + LOOK_AT_DISK_BYTES
            disk = os.statvfs(self._folder)
            if disk.f_bavail * disk.f_frsize < self._free_min + LOOK_AT_DISK_BYTES:
                raise ImageRefusedError(
                    f"{self._folder} has no room for it: {format_bytes(self._free_min)} of the "
                    "disk stay free; make room, or choose another --state-dir"
                )

    def spend_entry(self) -> None:
        """One entry of a layer."""
        self.files += 1
        if self.files > self.files_max:
            raise ImageRefusedError(f"its layers have more than {self.files_max} entries "
                                    "(--image-files)")  # fmt: skip
