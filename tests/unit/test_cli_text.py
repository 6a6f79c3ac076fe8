"""What untrusted text does to a person's terminal: nothing."""

import json

import msgspec
import pytest

from outrider.cli.common import print_json, print_json_line, print_table
from outrider.cli.exits import printable

FORGED = "zone=\u2028      n2    fits"


def test_a_cell_makes_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NODE", "WHY NOT"), [("n1", FORGED), ("n3", "a\x85b\x0cc\u2029d")])
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 3 and "\\u2028" in told and "\\u2029" in told


@pytest.mark.parametrize("char", ["\u202e", "\u2066", "\u200f", "\ufeff", "\x1b", "\x9b", "\u2028"])
def test_what_reorders_hides_or_controls_is_spelled_out(char: str) -> None:
    assert char not in printable(f"rm{char}fr")
    assert printable("über 東京 ok") == "über 東京 ok"


def test_json_holds_no_character_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"data": "a\x9b31mb\x7f"}
    for write in (print_json, print_json_line):
        write(document)
        told = capsys.readouterr().out
        assert "\x9b" not in told and "\x7f" not in told
        assert json.loads(told) == document == msgspec.json.decode(told)
