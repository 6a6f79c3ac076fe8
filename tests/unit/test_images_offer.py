"""What operators write about images, and what a node makes of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from idl.errors import ConfigError, PlatformFaultError
from node_agent.core.images import DIRECTORY, ImageSource, parse_images, parse_source
from node_agent.images import offer
from node_agent.images.offer import NodeImages
from node_agent.sandbox.plan import Enforcement
from tests.images import Layout
from tests.unit.test_images_layers import files


def launcher(*paths: str) -> Enforcement:
    return Enforcement(
        enforced=frozenset(), missing={}, mode="root", cgroup="v2", kernel="6", landlock_abi=6,
        seccomp=True, image_paths=paths,
    )  # fmt: skip


def test_sources_are_read_and_the_agents_own_go_over_the_clusters() -> None:
    shared = {"a": "dir:/srv/a", "b": "oci:/srv/b"}
    assert parse_images(shared, ["b=oci:/x/b:3.20", "c=dir:/c"]) == {
        "a": ImageSource("dir", "/srv/a"),
        "b": ImageSource("oci", "/x/b", "3.20"),
        "c": ImageSource("dir", "/c"),
    }


@pytest.mark.parametrize(
    "text", ["", "dir", "/srv/a", "dir:srv/a", "dir:/a:b", "oci:/a:", "tar:/a", "docker://alpine"]
)
def test_sources_that_are_not_understood_are_told_with_the_way_to_write_them(text: str) -> None:
    with pytest.raises(ConfigError, match="write NAME=dir:/PATH"):
        parse_source("a", text)


def test_names_that_are_none_or_twice() -> None:
    with pytest.raises(ConfigError, match="not a name"):
        parse_images({}, ["al:pine=dir:/a"])
    with pytest.raises(ConfigError, match="twice"):
        parse_images({}, ["a=dir:/a", "a=dir:/b"])


async def test_directories_are_there_at_once_unless_they_cannot_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, root = tmp_path / "state", tmp_path / "root"
    state.mkdir()
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    sources = {
        name: ImageSource("dir", str(path))
        for name, path in {
            "good": tmp_path / "link", "absent": tmp_path / "absent", "above": tmp_path,
            "all": Path("/"),
        }.items()
    }  # fmt: skip
    images = NodeImages(sources, state)
    assert images.paths == (str(root),)
    assert images.offered(launcher(str(root))) == {"good": DIRECTORY}
    assert images.offered(launcher()) == {}
    found = await images.get("good")
    assert found is not None and found.root == str(root) and await images.get("") is None
    with pytest.raises(PlatformFaultError, match="image absent is not on this node"):
        await images.get("absent")
    told = {record.__dict__["image"]: record.__dict__["reason"] for record in caplog.records}
    assert set(told) == {"absent", "above", "all", "good"}, "the last: by a launcher without it"
    assert "holds the agent's state directory" in told["all"]


async def test_layouts_are_unpacked_beside_the_work_and_one_that_fails_hinders_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = Layout(tmp_path / "layout")
    descriptor = made.image(files(a="1"), env=("A=image",))
    made.tag(descriptor, "latest")
    sources = {
        "broken": ImageSource("oci", str(tmp_path / "absent")),
        "good": ImageSource("oci", str(made.folder), "latest"),
    }
    images = NodeImages(sources, tmp_path)
    store = tmp_path / "images"
    (store / "tmp.left").mkdir()
    (store / "v1-sha256-old").mkdir()
    assert images.paths == (str(store),) and images.offered(launcher(str(store))) == {}
    waiting = asyncio.create_task(images.get("good"))
    changes: list[int] = []
    await images.unpack(lambda: changes.append(1), sweep=True)
    assert changes == [1] and images.offered(launcher(str(store))) == {"good": descriptor["digest"]}
    found = await waiting
    assert found is not None and found.env == {"A": "image"}
    assert (Path(found.root) / "a").read_text() == "1"
    with pytest.raises(PlatformFaultError, match="image broken"):
        await images.get("broken")
    names = {path.name for path in store.iterdir()}
    assert names == {"v1-sha256-old", Path(found.root).parent.name}, "nothing swept: one is missing"
    assert {"image not offered", "unpacking", "image ready"} <= {r.message for r in caplog.records}
    again = NodeImages({"good": sources["good"]}, tmp_path)
    await again.unpack(lambda: None, sweep=False)
    assert (store / "v1-sha256-old").exists(), "a job of before may have it"
    await again.unpack(lambda: None, sweep=True)
    assert {path.name for path in store.iterdir()} == {Path(found.root).parent.name}


async def test_an_image_that_takes_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(offer, "UNPACK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(offer, "_BOOT", "import time; time.sleep(60)")
    images = NodeImages({"slow": ImageSource("oci", str(tmp_path))}, tmp_path)
    await asyncio.wait_for(images.unpack(lambda: None, sweep=True), 10)
    assert "not unpacked within 0.2 s" in caplog.records[-1].__dict__["reason"]


async def test_a_process_that_dies_or_talks_nonsense_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for boot, reason in (
        ("import os; os.kill(os.getpid(), 9)", "was killed"),
        ("print('nonsense')", "failed"),
        ("print('x' * 200_000)", "failed"),
    ):
        monkeypatch.setattr(offer, "_BOOT", boot)
        images = NodeImages({"odd": ImageSource("oci", str(tmp_path))}, tmp_path)
        await asyncio.wait_for(images.unpack(lambda: None, sweep=True), 10)
        assert reason in caplog.records[-1].__dict__["reason"], boot
