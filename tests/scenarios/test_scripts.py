"""Every script in `scripts/` plays as recorded. `REWRITE=1` records anew."""

import os
from pathlib import Path

import pytest

from tests.scenarios.script import Stage

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.txt"))
RULE = "----"


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(commands, recorded output) of each block; blocks are separated by an empty line."""
    found: list[tuple[str, str]] = []
    for block in text.strip().split("\n\n"):
        commands, _, output = block.partition(f"\n{RULE}")
        found.append((commands, output.strip("\n")))
    return found


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 8


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    stage = Stage()
    played: list[str] = []
    for commands, recorded in blocks_of(path.read_text()):
        output = stage.play(commands)
        played.append(f"{commands}\n{RULE}\n{output}")
        if not os.environ.get("REWRITE"):
            assert output == recorded, f"after:\n{commands}"
    if os.environ.get("REWRITE"):
        path.write_text("\n\n".join(played) + "\n")
