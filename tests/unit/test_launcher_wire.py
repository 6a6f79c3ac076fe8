"""The launcher's JSON agrees with the json package, which it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node_agent.launcher import wire

_REPO = str(Path(__file__).resolve().parents[2])

MESSAGES: list[dict[str, Any]] = [
    {},
    {"op": "run", "argv": ["/bin/true", 'a"b\\c\n', "\u00e4\U0001f600"], "env": {"A": ""}},
    {"big": 2**63, "negative": -1, "none": None, "yes": True, "no": False, "nested": {"a": [{}]}},
]


@pytest.mark.parametrize("message", MESSAGES)
def test_both_ways_as_the_package_does(message: dict[str, Any]) -> None:
    assert json.loads(wire.dumps(message)) == message
    assert wire.loads(json.dumps(message).encode()) == message
    assert wire.loads(json.dumps(message, ensure_ascii=False, indent=1).encode()) == message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"1", b"{} {}", b'{"a":}', b"\xff"])
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        wire.loads(data)


def test_what_json_has_no_form_for_is_refused() -> None:
    with pytest.raises(TypeError):
        wire.dumps({"a": b"bytes"})


def test_the_launcher_stays_small() -> None:
    """Every module that it imports is memory of every node, and code that runs with privileges."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import node_agent.launcher.main; "
    program += "print(*sorted(sys.modules))"
    command = [sys.executable, "-I", "-S", "-c", program, _REPO]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"json", "re", "enum", "collections", "functools", "typing", "pathlib", "contextlib"}
    assert not heavy & set(loaded)
