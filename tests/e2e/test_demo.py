"""The demo itself, on both brokers: it fails where anything was lost, doubled or left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import require_apache

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kafka", "files"), [("embedded", 150), pytest.param("apache", 60, marks=pytest.mark.apache)]
)
def test_the_demo_accounts_for_everything(kafka: str, files: int) -> None:
    if kafka == "apache":
        require_apache()
    run = subprocess.run(
        [sys.executable, "-m", "chaos.demo", "--json", "--kafka", kafka, "--files", str(files)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout)
    assert report["problems"] == []
    assert report["library"]["files"] == files
    assert report["terms"] >= 2
    assert report["next_decision_ms"] is not None
