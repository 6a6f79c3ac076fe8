# ruff: noqa: PTH102, PTH103, PTH112
# pathlib would add a third to the memory that every job's fork copies.
"""Roots of jobs that have an image, for container runtimes: a folder each in the launcher's own
mount namespace, put together as the native launcher's are (`node_agent.launcher.images`)."""

from __future__ import annotations

import os
import shutil

from node_agent.launcher import kernel
from node_agent.launcher.images import Images, Opened, assemble

_READ_ONLY = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV


class OciImages(Images):
    """Where images may lie, and the folder of each that a job asked for."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self._home = f"{home}/images"
        self._folders: dict[str, str] = {}

    def open(self, paths: list[str]) -> None:
        """Find those that are there; this launcher keeps the host's tree in view."""
        shutil.rmtree(self._home, ignore_errors=True)  # a dead launcher's; nothing is mounted there
        for path in paths:
            if os.path.isdir(path):
                self.paths.append(path)
            else:
                self.problems.append(f"images in {path} cannot be used: no such directory")

    def ready(self, image: str) -> None:
        """Make the folder of ``image`` unless it is there. Raises OSError as the native one."""
        if not image or image in self._folders:
            return
        number, below = self.locate(image)
        root = f"{self._home}/{len(self._folders)}"
        os.makedirs(root, exist_ok=True)
        try:
            with Opened(self.paths[number], below) as source:
                assemble(source, root)
            os.mkdir(f"{root}/dev/shm")  # gVisor makes no mount points below a tmpfs
            kernel.mount_setattr(kernel.AT_FDCWD, root, kernel.AT_RECURSIVE, _READ_ONLY)
        except OSError as error:
            if os.path.ismount(root):
                kernel.umount(root)
            raise OSError(error.errno, f"image {image}: {error.strerror}") from error
        self._folders[image] = root

    def root(self, image: str, otherwise: str) -> str:
        """Its folder; ``otherwise`` where the job has none."""
        return self._folders[image] if image else otherwise

    def close(self) -> None:
        """Nothing is mounted any more."""
        for root in self._folders.values():
            kernel.umount(root)
        self._folders.clear()
