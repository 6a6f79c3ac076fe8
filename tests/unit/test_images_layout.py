"""OCI layouts: which image they hold for this machine, digests, and the process that unpacks."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node_agent.images.bounds import Budget, ImageRefusedError
from node_agent.images.layout import Descriptor, Layout
from node_agent.images.unpack import Answer, Request
from tests.images import ARCHITECTURE, entry, layer_of
from tests.images import Layout as Made
from tests.unit.test_images_layers import files, tree

REPO = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "layout")


def request(made: Made, store: Path, **fields: Any) -> Request:
    store.mkdir(exist_ok=True)
    bounds: dict[str, Any] = {"ref": "", "bytes_max": 1 << 30, "files_max": 10_000,
                              "free_bytes_min": 0}  # fmt: skip
    return Request(layout=str(made.folder), store=str(store), **(bounds | fields))


def run(asked: Request) -> list[Answer]:
    """The process as the agent starts it; its answers in order."""
    done = subprocess.run(
        [sys.executable, "-m", "node_agent.images.unpack", str(os.getpid())], cwd=REPO,
        input=msgspec.json.encode(asked), capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    return [msgspec.json.decode(line, type=Answer) for line in done.stdout.splitlines()]


def refusal(made: Made, ref: str = "") -> str:
    with pytest.raises(ImageRefusedError) as caught:
        layout = Layout(made.folder)
        image = layout.image(layout.find(ref))
        for layer in image.layers:
            with layer.opened(Budget(1 << 20, 100)) as tar:
                list(tar)
    return str(caught.value)


def test_an_image_is_unpacked_once_and_found_again(made: Made, tmp_path: Path) -> None:
    descriptor = made.image(files(a="1", b="2"), files(a="3"), env=("PATH=/x", "EMPTY=", "odd"))
    made.tag(descriptor)
    store = tmp_path / "store"
    answers = run(request(made, store))
    unpacked = answers[-1].unpacked
    assert [one.at for one in answers[:-1]] == ["layer 1 of 2", "layer 2 of 2"]
    assert unpacked is not None and unpacked.digest == descriptor["digest"]
    assert unpacked.env == {"PATH": "/x", "EMPTY": ""} and unpacked.entries == 3
    (folder,) = store.iterdir()
    assert folder.name == unpacked.folder == "v1-" + descriptor["digest"].replace(":", "-")
    assert tree(folder / "root") == {"a": "3", "b": "2"}
    for blob in (made.folder / "blobs/sha256").iterdir():
        if blob.name != descriptor["digest"][7:]:
            blob.unlink()  # layers are not read again
    (again,) = run(request(made, store))
    assert again.reused and again.unpacked == unpacked


@pytest.mark.parametrize("zipped", [True, False])
def test_layers_are_read_packed_and_plain(made: Made, tmp_path: Path, zipped: bool) -> None:
    made.tag(made.image(files(a="1"), zipped=zipped))
    run(request(made, tmp_path / "store"))
    (folder,) = (tmp_path / "store").iterdir()
    assert tree(folder / "root") == {"a": "1"}


def test_a_refused_image_leaves_nothing(made: Made, tmp_path: Path) -> None:
    made.tag(made.image(files(a="1"), layer_of((entry("../x"), b"!"))))
    store = tmp_path / "store"
    assert "'..'" in run(request(made, store))[-1].refused
    made.manifests.clear()
    made.tag(made.image(layer_of((entry("zeros"), bytes(1 << 20)))))
    assert "--image-bytes" in run(request(made, store, bytes_max=1 << 19))[-1].refused
    assert "--image-files" in run(request(made, store, files_max=0))[-1].refused
    assert list(store.iterdir()) == [] and not (tmp_path / "x").exists()


def platformed(descriptor: dict[str, Any], architecture: str, os_name: str = "linux") -> Any:
    return {**descriptor, "platform": {"os": os_name, "architecture": architecture}}


def test_the_image_of_this_machine_is_chosen_in_nested_indexes(made: Made) -> None:
    ours = made.image(files(a="ours"))
    others = made.image(files(a="other"), architecture="riscv64")
    inner = made.index(
        platformed(others, "riscv64"),
        platformed(ours, ARCHITECTURE),
        platformed(made.image(files(a="proof")), "unknown", "unknown"),
    )
    made.tag(inner, "all").tag(others, "other")
    assert Layout(made.folder).find("all").digest == ours["digest"]
    assert "for riscv64" not in refusal(made, "other") and "riscv64" in refusal(made, "other")
    assert "no image named 'nope' (there: all, other)" in refusal(made, "nope")


def test_several_images_ask_for_a_name(made: Made) -> None:
    made.tag(made.image(files(a="1")), "one").tag(made.image(files(a="2")), "two")
    assert "oci:PATH:REF (there: one, two)" in refusal(made)
    assert Layout(made.folder).find("two").digest == made.manifests[1]["digest"]


def test_only_other_machines(made: Made) -> None:
    made.tag(platformed(made.image(files(a="1"), architecture="s390x"), "s390x"))
    assert f"no image for linux/{ARCHITECTURE} (for: linux/s390x)" in refusal(made)


def test_every_byte_is_verified(made: Made) -> None:
    descriptor = made.image(files(a="1"))
    made.tag(descriptor)
    blobs = made.folder / "blobs/sha256"
    manifest = json.loads((blobs / descriptor["digest"][7:]).read_text())
    for part in (descriptor, manifest["config"], manifest["layers"][0]):
        path = blobs / part["digest"][7:]
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert refusal(made), part
        path.write_bytes(good + b" ")
        assert "bytes, not" in refusal(made)
        path.unlink()
        assert "cannot read" in refusal(made)
        os.mkfifo(path)
        assert "not a regular file" in refusal(made)
        path.unlink()
        path.write_bytes(good)
    Layout(made.folder).image(Layout(made.folder).find(""))


def remade(made: Made, **changes: Any) -> None:
    """An image whose manifest is changed, with digests that fit."""
    blob = made.folder / "blobs/sha256" / made.image(files(a="1"))["digest"][7:]
    document = json.loads(blob.read_text()) | changes
    made.manifests.clear()
    made.tag(made.blob(json.dumps(document).encode(), "manifest.v1+json"))


def test_manifests_that_are_not_as_they_should_be(made: Made) -> None:
    tar = files(a="1")
    other = gzip.compress(tar + bytes(512))  # unpacks to something else than its diff_id
    remade(made, layers=[made.blob(other, "layer.v1.tar+gzip")])
    assert "corrupt" in refusal(made)
    remade(made, layers=[made.blob(tar, "layer.v1.tar+gzip")])
    assert "gzip" in refusal(made).lower()
    remade(made, layers=[made.blob(tar, "layer.v1.tar+rar")])
    assert "not known" in refusal(made)
    remade(made, layers=[])
    assert "0 layers and 1 diff_ids" in refusal(made)
    remade(made, layers=[{"digest": "sha256:../../../../etc/passwd", "size": 1}])
    assert "sha256:<64 digits>" in refusal(made)
    remade(made, config={"digest": "md5:1", "size": 1})
    assert "sha256:<64 digits>" in refusal(made)
    remade(made, layers="none")
    assert "specification" in refusal(made)


def test_mazes_of_indexes_end(made: Made) -> None:
    image = made.image(files(a="1"))
    for _ in range(5):
        image = made.index(image)
    made.tag(image)
    assert "4 deep" in refusal(made)
    made.manifests.clear()
    for number in range(80):
        made.tag(made.index({**image, "annotations": {"n": str(number)}}))
    assert "deep" in refusal(made) or "documents" in refusal(made)


def test_a_folder_that_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(ImageRefusedError, match="cannot read"):
        Layout(tmp_path)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "2.0"}')
    with pytest.raises(ImageRefusedError, match="version 1"):
        Layout(tmp_path)
    (tmp_path / "oci-layout").write_text("[" * 100_000)
    with pytest.raises(ImageRefusedError, match="specification"):
        Layout(tmp_path)


def test_an_environment_that_is_too_large_or_odd(made: Made) -> None:
    made.tag(made.image(files(a="1"), env=("A=" + "x" * 40_000,)))
    assert "environment" in refusal(made)
    made.manifests.clear()
    made.tag(made.image(files(a="1"), env=("A=\0",)))
    assert "NUL" in refusal(made)


def test_a_document_is_what_its_digest_says(made: Made) -> None:
    text = b'{"manifests": []}'
    found = made.blob(text, "index.v1+json")
    wrong = Descriptor(f"sha256:{hashlib.sha256(b'x').hexdigest()}", len(text))
    os.link(made.folder / "blobs/sha256" / found["digest"][7:],
            made.folder / "blobs/sha256" / wrong.digest[7:])  # fmt: skip
    made.tag(made.image(files(a="1")))
    with pytest.raises(ImageRefusedError, match="corrupt"):
        Layout(made.folder).document(wrong, dict[str, Any])
