"""What a run that was interrupted or killed leaves, and who removes it."""

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

import chaos.demo.__main__ as demo
from chaos import sweep
from chaos.faults import network
from outrider.local.cluster import LocalCluster
from outrider.local.process import Identity


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(network, "sweep", list)
    return tmp_path


def owned(home: Path, name: str, *, alive: bool) -> Path:
    folder = home / name
    folder.mkdir()
    sweep.mark_owner(folder)
    if not alive:
        gone = Identity(pid=os.getpid(), start_ticks=1)
        (folder / sweep.OWNER_FILE).write_bytes(msgspec.json.encode(gone))
    return folder


def test_what_dead_owners_left_is_removed_and_nothing_else(home: Path) -> None:
    left = [owned(home, f"outrider-{kind}-7-x", alive=False) for kind in ("chaos", "demo")]
    kept = [owned(home, f"outrider-{kind}-8-x", alive=True) for kind in ("chaos", "demo")]
    kept.append(home / "outrider-demo-9-x")
    kept[-1].mkdir()
    assert sweep.clean(lambda _line: None) == [f"folder {folder}" for folder in left]
    assert sorted(home.iterdir()) == sorted(kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_nothing(
    number: signal.Signals,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[Path] = []

    def start(options: Any, _say: object) -> None:
        started.append(options.folder)
        (options.folder / "logs").mkdir()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(LocalCluster, "start", start)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert demo.main(["--json"]) == 130
    finally:
        assert before == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert started
    assert list(home.iterdir()) == []
    assert capsys.readouterr().err == "demo: interrupted; its cluster is stopped and removed\n"
