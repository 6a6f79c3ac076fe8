"""The state directory and the spools in it: private, one agent, nothing lost by a torn write."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idl.errors import ConfigError
from node_agent.spool import Piece, Spool, Stream
from node_agent.state import StateDir, state_path

PIECES = st.lists(
    st.builds(
        Piece,
        st.sampled_from(["stdout", "stderr"]),
        st.binary(min_size=1, max_size=40),
        st.integers(0, 2**40),
    ),
    max_size=8,
)


def total(pieces: list[Piece], stream: Stream) -> bytes:
    return b"".join(piece.data for piece in pieces if piece.stream == stream)


@given(PIECES, PIECES, st.data())
def test_a_spool_goes_on_after_any_torn_write(
    tmp_path_factory: pytest.TempPathFactory, before: list[Piece], after: list[Piece],
    data: st.DataObject,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("spool") / "a.1"
    spool = Spool(path)
    for piece in before:
        spool.append(piece)
    spool.close()
    if before:
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    again = Spool(path)
    found = again.recover()
    for stream in ("stdout", "stderr"):
        assert total(before, stream).startswith(total(found, stream))
    for piece in after:
        again.append(piece)
    again.close()
    assert Spool(path).recover() == [*found, *after]
    again.remove()
    assert not path.exists()


def test_no_output_makes_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.1")
    assert spool.recover() == []
    spool.remove()
    assert list(tmp_path.iterdir()) == []


def test_one_agent_per_state_directory(tmp_path: Path) -> None:
    first = StateDir(tmp_path / "n1")
    assert first.path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="another agent runs on state directory"):
        StateDir(tmp_path / "n1")
    StateDir(tmp_path / "n2").close()
    first.close()
    StateDir(tmp_path / "n1").close()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot use state directory .*--state-dir"):
        StateDir(tmp_path / "file" / "n1")


def test_spools_of_unknown_attempts_are_removed(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "n1")
    for name in ("a.1", "b.1"):
        (state.output / name).write_bytes(b"")
    state.tidy({"b.1"})
    assert [path.name for path in state.output.iterdir()] == ["b.1"]
    state.close()


@pytest.mark.parametrize(
    ("configured", "chosen", "expected"),
    [
        ("", "", "/etc/outrider/state/n1"),
        ("/var/a", "", "/var/a/n1"),
        ("/var/a", "/var/b", "/var/b/n1"),
    ],
)
def test_where_it_is(configured: str, chosen: str, expected: str) -> None:
    config = Path("/etc/outrider/cluster.yaml")
    assert str(state_path(config, configured, chosen, "n1")) == expected
