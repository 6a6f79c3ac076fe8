"""Layers laid over each other: what they say, and what hostile ones may not do."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.images.bounds import DEPTH_MAX, HEADER_BYTES_MAX, Budget, ImageRefusedError
from node_agent.images.layers import Root
from node_agent.images.tar import TarReader
from tests.images import entry, layer_of

DIR, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


class Bytes:
    """A layer in memory, without digests."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @contextmanager
    def opened(self, budget: Budget) -> Iterator[TarReader]:
        stream = io.BytesIO(self._data)

        def read(size: int) -> bytes:
            data = stream.read(size)
            budget.spend_bytes(len(data))
            return data

        yield TarReader(read)


def lay(folder: Path, *layers: bytes, budget: Budget | None = None) -> Root:
    folder.mkdir(exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    root = Root(fd, budget or Budget(1 << 30, 10_000))
    try:
        for layer in layers:
            root.lay(Bytes(layer))
    finally:
        root.close()
        os.close(fd)
    return root


def tree(folder: Path) -> dict[str, str]:
    """Every name below: content, link target or '/'."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = "/" if path.is_dir() else path.read_text()
    return found


def files(**texts: str) -> bytes:
    return layer_of(*((entry(name.replace("__", "/")), text.encode())
                      for name, text in texts.items()))  # fmt: skip


def removing(*names: str, **texts: str) -> bytes:
    return layer_of(*((entry(name), b"") for name in names),
                    *((entry(name.replace("__", "/")), text.encode())
                      for name, text in texts.items()))  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("untouched")
    return tmp_path / "root"


def test_later_layers_lie_over_earlier_ones(root: Path) -> None:
    last = layer_of((entry("y", HARD, linkname="d/y"), b""), (entry("l", LINK, linkname="a"), b""))
    lay(root, files(a="1", d__x="2", d__y="3"), files(a="4", d__z="5"), last)
    assert tree(root) == {"a": "4", "d": "/", "d/x": "2", "d/y": "3", "d/z": "5", "y": "3",
                          "l": "-> a"}  # fmt: skip
    assert (root / "y").samefile(root / "d/y")


def test_whiteouts_remove_what_lies_below_and_nothing_of_their_own_layer(root: Path) -> None:
    base = files(a="1", b="2", d__x="3", d__y="4", e__deep__z="5")
    lay(root, base, removing(".wh.a", "d/.wh.x", ".wh.e", ".wh.absent", "no/.wh.such", b="new"))
    assert tree(root) == {"b": "new", "d": "/", "d/y": "4"}
    own_first = layer_of((entry("d/own"), b"6"), (entry("d/.wh..wh..opq"), b""))
    lay(root, own_first)  # a first layer has nothing below it
    assert tree(root)["d/own"] == "6" and "d/y" in tree(root)


def test_an_opaque_folder_hides_all_below_whatever_the_order(tmp_path: Path) -> None:
    base, marker = files(d__x="1", d__s__y="2", k="3"), (entry("d/.wh..wh..opq"), b"")
    for number, members in enumerate([(marker, (entry("d/own"), b"4")),
                                      ((entry("d/own"), b"4"), marker)]):  # fmt: skip
        folder = tmp_path / str(number)
        lay(folder, base, layer_of(*members))
        assert tree(folder) == {"d": "/", "d/own": "4", "k": "3"}


def test_kinds_replace_each_other(root: Path) -> None:
    lay(root, files(a="1", d__x="2"), layer_of((entry("l", LINK, linkname="d"), b"")),
        layer_of((entry("a", DIR), b""), (entry("d"), b"file"), (entry("l", DIR), b"")),
        layer_of((entry("a/in"), b"3"), (entry("l/in"), b"4"), (entry("./"), b"")))  # fmt: skip
    assert tree(root) == {"a": "/", "a/in": "3", "d": "file", "l": "/", "l/in": "4"}


def test_entries_go_through_links_of_earlier_layers_within_the_root(root: Path) -> None:
    """As `bin -> usr/bin` of a distribution, written through by a layer made by hand."""
    lay(root, layer_of((entry("usr/bin", DIR), b""), (entry("bin", LINK, linkname="usr/bin"), b""),
                       (entry("abs", LINK, linkname="/usr/bin"), b"")),
        layer_of((entry("bin/a"), b"1"), (entry("abs/b"), b"2"), (entry("bin/.wh.a"), b"")),
        removing("abs/.wh.b"))  # fmt: skip
    assert tree(root) == {"usr": "/", "usr/bin": "/", "usr/bin/a": "1", "bin": "-> usr/bin",
                          "abs": "-> /usr/bin"}  # fmt: skip


def test_nothing_is_taken_over_but_content_time_and_whether_it_runs(root: Path) -> None:
    info = entry("suid", mode=0o6777, uid=0, gid=0, mtime=1_000_000, uname="root")
    info.pax_headers = {"SCHILY.xattr.security.capability": "x" * 20}
    lay(root, layer_of((info, b"x"), (entry("secret", mode=0o000), b"y"),
                       (entry("sticky", DIR, mode=0o1777), b"")))  # fmt: skip
    facts = (root / "suid").stat()
    assert stat.S_IMODE(facts.st_mode) == 0o755 and facts.st_mtime == 1_000_000
    assert stat.S_IMODE((root / "secret").stat().st_mode) == 0o644
    assert stat.S_IMODE((root / "sticky").stat().st_mode) == 0o755
    assert facts.st_uid == os.geteuid() and os.listxattr(root / "suid") == []


def test_devices_and_fifos_are_left_out(root: Path) -> None:
    kinds = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    members = [(entry(f"n{n}", kind, devmajor=1, devminor=3), b"") for n, kind in enumerate(kinds)]
    laid = lay(root, layer_of(*members, (entry("a"), b"1")))
    assert tree(root) == {"a": "1"} and laid.left_out == 3


def hostile(root: Path) -> dict[str, tuple[bytes, ...]]:
    outside = str(root.parent)
    straight = layer_of((entry("esc", LINK, linkname=outside), b""))
    return {
        "dots": (layer_of((entry("../outside"), b"!")),),
        "dots inside": (layer_of((entry("a/../../outside"), b"!")),),
        "a hard link with dots": (layer_of((entry("h", HARD, linkname="../outside"), b"")),),
        "a hard link to an absolute name":
            (layer_of((entry("h", HARD, linkname=f"{outside}/outside"), b"")),),
        "a hard link through a link":
            (straight, layer_of((entry("h", HARD, linkname="esc/outside"), b""))),
        "a hard link to a folder":
            (files(d__x="1"), layer_of((entry("h", HARD, linkname="d"), b""))),
        "a hard link to the root": (layer_of((entry("h", HARD, linkname="/"), b"")),),
        "a file in place of the root": (layer_of((entry("/"), b"!")),),
        "a whiteout with dots": (files(a="1"), removing(".wh...")),
        "a whiteout of the folder itself": (files(d__a="1"), removing("d/.wh..")),
        "a whiteout that climbs": (files(a="1"), removing("../.wh.outside")),
        "through a file": (files(a="1"), files(a__b="2")),
        "through a link that leads nowhere":
            (layer_of((entry("l", LINK, linkname="nowhere"), b"")), files(l__b="2")),
        "through a loop": (layer_of((entry("l", LINK, linkname="l"), b"")), files(l__b="2")),
        "a name that is too long": (layer_of((entry("n" * 300), b"")),),
        "too deep": (layer_of((entry("d/" * (DEPTH_MAX + 2) + "x"), b"")),),
        "a link without a target": (layer_of((entry("l", LINK, linkname=""), b"")),),
    }  # fmt: skip


HOSTILE = sorted(hostile(Path("/x/root")))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layers_are_refused_and_nothing_outside_is_touched(root: Path, name: str) -> None:
    with pytest.raises(ImageRefusedError):
        lay(root, *hostile(root)[name])
    assert sorted(path.name for path in root.parent.iterdir()) == ["outside", "root"]
    assert (root.parent / "outside").read_text() == "untouched"
    assert (root.parent / "outside").stat().st_nlink == 1


def test_links_out_of_the_root_lead_to_its_own_top(root: Path) -> None:
    """Not refused, because distributions have such links; the kernel keeps them inside."""
    climbing = layer_of((entry("up", LINK, linkname="../../.."), b""),
                        (entry("abs", LINK, linkname=str(root.parent)), b""))  # fmt: skip
    lay(root, climbing, layer_of((entry("up/new"), b"1"), (entry("/etc/abs"), b"2"),
                                 (entry("up/.wh.outside"), b"")))  # fmt: skip
    assert (root / "new").read_text() == "1" and (root / "etc/abs").read_text() == "2"
    assert (root.parent / "outside").read_text() == "untouched"


def test_a_link_is_replaced_not_written_through(root: Path) -> None:
    outside = root.parent / "outside"
    one = layer_of((entry("l", LINK, linkname=str(outside)), b""), (entry("l"), b"own"))
    link = layer_of((entry("m", LINK, linkname=str(outside)), b""))
    lay(root, one, link, layer_of((entry("m"), b"own")))
    assert tree(root) == {"l": "own", "m": "own"} and outside.read_text() == "untouched"


def test_a_hard_link_is_cut_before_it_is_written(root: Path) -> None:
    lay(root, layer_of((entry("a"), b"1"), (entry("b", HARD, linkname="a"), b""),
                       (entry("b", HARD, linkname="b"), b"")), files(b="2"))  # fmt: skip
    assert tree(root) == {"a": "1", "b": "2"}


def test_deep_folders_made_step_by_step_through_links_have_a_bound(root: Path) -> None:
    step = "d/" * 60
    first = layer_of((entry(f"{step}end"), b""), (entry("s", LINK, linkname=step + "."), b""))
    with pytest.raises(ImageRefusedError, match="deeper than"):
        lay(root, first, layer_of((entry(f"s/{step}x"), b"")))


def test_bytes_entries_and_headers_have_bounds(root: Path) -> None:
    with pytest.raises(ImageRefusedError, match="--image-bytes"):
        lay(root, layer_of((entry("zeros"), bytes(100_000))), budget=Budget(50_000, 10))
    many = layer_of(*((entry("same"), b"") for _ in range(20)))
    with pytest.raises(ImageRefusedError, match="more than 10 entries"):
        lay(root, many, budget=Budget(1 << 20, 10))
    info = entry("x")
    info.pax_headers = {"comment": "c" * (HEADER_BYTES_MAX + 1)}
    with pytest.raises(ImageRefusedError, match="extended header"):
        lay(root, layer_of((info, b"")))
    full = Budget(1 << 30, 10, str(root), 1 << 62)
    with pytest.raises(ImageRefusedError, match="no room"):
        lay(root, files(a="1"), budget=full)


def damaged(name: str) -> bytes:
    good = bytearray(layer_of((entry("a"), b"1" * 600)))
    if name == "cut within a file":
        return bytes(good[:700])
    if name == "cut within a header":
        return bytes(good[:300])
    if name == "a wrong checksum":
        good[0] ^= 1
    if name == "no tar at all":
        return b"x" * 2048
    header = tarfile.TarInfo("a")
    if name == "an unknown type":
        header.type = b"V"
    if name == "a sparse file":
        header.pax_headers = {"GNU.sparse.major": "1"}
    if name == "a size that is no number":
        header.pax_headers = {"size": "-5"}
    if name in {"an unknown type", "a sparse file", "a size that is no number"}:
        return layer_of((header, b""))
    if name == "a negative size":
        good[124:136] = b"\xff" * 12
        good[148:156] = b"%06o\0 " % (sum(good[:148]) + sum(good[156:512]) + 256)
    if name == "NUL in a name":
        header.pax_headers = {"path": "a\0b"}
        return layer_of((header, b""))
    return bytes(good)


@pytest.mark.parametrize("name", [
    "cut within a file", "cut within a header", "a wrong checksum", "no tar at all",
    "an unknown type", "a sparse file", "a size that is no number", "a negative size",
    "NUL in a name",
])  # fmt: skip
def test_what_is_no_tar_of_ours_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ImageRefusedError):
        lay(root, damaged(name))


def test_long_names_of_both_kinds_are_read(root: Path) -> None:
    name = "/".join(["n" * 90] * 4)
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            info = tarfile.TarInfo(f"{number}/{name}")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
            link = entry(f"{number}/l", LINK, linkname=name)
            tar.addfile(link)
        lay(root, out.getvalue())
        assert (root / str(number) / name).read_text() == "ok"
        assert (root / str(number) / "l").readlink() == Path(name)


@given(st.binary(max_size=1500), st.integers(0, 1400))
def test_any_bytes_end_in_a_refusal_or_a_tree(noise: bytes, at: int) -> None:
    good = bytearray(layer_of((entry("a/b"), b"1"), (entry("l", LINK, linkname="a"), b"")))
    good[at : at + len(noise)] = noise
    reader = TarReader(io.BytesIO(good).read)
    try:
        for found in reader:
            assert b"\0" not in found.name and 0 <= found.size < 1 << 63
    except ImageRefusedError:
        return
