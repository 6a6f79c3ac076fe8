"""Images as tests make them: a tiny root of this machine's programs, an OCI layout of layers."""

import gzip
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

PROGRAMS = ("sh", "cat", "ls", "touch", "id", "mkdir", "ln", "head", "sleep")
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "unknown")


def tiny_root(folder: Path, *more: str) -> Path:
    """A root with a shell and a few programs, each with the libraries that it is linked to.

    A copy of every file: no library of the host is needed to run them.
    """
    for name in (*PROGRAMS, *more):
        program = shutil.which(name, path="/bin:/usr/bin")
        assert program is not None, f"no {name} on this machine"
        _copy(Path(program).resolve(), folder / "usr/bin" / name)
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
        for library in re.findall(r"(/\S+)", linked.stdout):
            _copy(Path(library).resolve(), folder / library.lstrip("/"))
    for name in ("bin", "sbin"):
        (folder / name).symlink_to("usr/bin")
    (folder / "etc").mkdir()
    (folder / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (folder / "etc/release").write_text("tiny\n")
    return folder


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source, target)
        target.chmod(0o755)


def entry(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    """One header of a layer."""
    found = tarfile.TarInfo(name)
    found.type = kind
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def layer_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar of just these entries, in this order, hostile ones too."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layer_of_folder(folder: Path) -> bytes:
    """A tar of all below a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(folder, arcname=".")
    return out.getvalue()


class Layout:
    """An OCI image layout in a folder, built up blob by blob."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs/sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, media: str) -> dict[str, Any]:
        """Stores it; its descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs/sha256" / digest).write_bytes(data)
        kind = f"application/vnd.oci.image.{media}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    def image(
        self, *layers: bytes, zipped: bool = True, env: tuple[str, ...] = (),
        architecture: str = ARCHITECTURE, **config: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Stores an image of these layers; the descriptor of its manifest."""
        document = {
            "os": "linux", "architecture": architecture, "config": {"Env": list(env), **config},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers],
            },
        }  # fmt: skip
        kind = "layer.v1.tar+gzip" if zipped else "layer.v1.tar"
        packed = [gzip.compress(one, 1, mtime=0) if zipped else one for one in layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(json.dumps(document).encode(), "config.v1+json"),
            "layers": [self.blob(one, kind) for one in packed],
        }
        return self.blob(json.dumps(manifest).encode(), "manifest.v1+json")

    def index(self, *manifests: dict[str, Any]) -> dict[str, Any]:
        """Stores a nested index; its descriptor."""
        document = {"schemaVersion": 2, "manifests": list(manifests)}
        return self.blob(json.dumps(document).encode(), "index.v1+json")

    def tag(self, descriptor: dict[str, Any], ref: str = "") -> "Layout":
        """Lists it in index.json."""
        named = {"annotations": {"org.opencontainers.image.ref.name": ref}} if ref else {}
        self.manifests.append({**descriptor, **named})
        document = {"schemaVersion": 2, "manifests": self.manifests}
        (self.folder / "index.json").write_text(json.dumps(document))
        return self
