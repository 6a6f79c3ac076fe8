"""Inputs and outputs over the whole path: submitter, Kafka, sandbox, Kafka, submitter."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idl.jobs import JobInput, PayloadRef
from outrider.client.errors import OutputMissingError
from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.slow
WAIT_S = 60.0


def test_files_go_in_and_come_out_small_and_large(cluster: Cluster) -> None:
    large = os.urandom(1_500_000)
    script = (
        "cat in/note.txt > out.txt; mkdir copies; cp in/data/large copies/; cat in/data/large "
        "in/note.txt > copies/both; echo more >> own.txt; ln -s /etc/passwd copies/link"
    )
    inputs = {"note.txt": "hi", "data/large": large,
              "own.txt": JobInput(data=b"mine ", writable=True)}  # fmt: skip
    handle = cluster.client.submit(
        cluster.sh(script, inputs=inputs, outputs=["out.txt", "copies/", "own.txt", "absent"])
    )
    assert handle.output("out.txt", WAIT_S) == b"hi"
    assert handle.output("copies/both") == large + b"hi"
    assert handle.output("own.txt") == b"mine more\n"
    record = handle.attempt_result()
    assert record is not None
    stored = {output.name: output for output in record.outputs}
    assert stored["out.txt"].ref is None and stored["copies/large"].ref is not None
    assert stored["copies/large"].sha256 == hashlib.sha256(large).hexdigest()
    assert record.outputs_missing == {"copies/link": "not a regular file", "absent": "not there"}
    with pytest.raises(OutputMissingError, match="not there"):
        handle.output("absent")
    again = cluster.client.submit(
        cluster.sh("sha256sum < in/before > $OUTRIDER_RESULT",
                   inputs={"before": stored["copies/large"].ref})
    )  # fmt: skip
    assert again.result(WAIT_S)[:64].decode() == stored["copies/large"].sha256


def test_an_input_that_is_not_what_was_promised_never_reaches_the_job(cluster: Cluster) -> None:
    first = cluster.client.submit(
        cluster.sh("head -c 100000 /dev/zero > z", outputs=["z"], id="promise")
    )
    first.wait(WAIT_S)
    record = first.attempt_result()
    assert record is not None and record.outputs[0].ref is not None
    ref = record.outputs[0].ref
    lie = PayloadRef(partition=ref.partition, offset=ref.offset, size_bytes=ref.size_bytes,
                     sha256="0" * 64)  # fmt: skip
    handle = cluster.client.submit(cluster.sh("exit 0", inputs={"z": lie}, retries=0))
    end = handle.wait(WAIT_S)
    assert end.error() is not None and "SHA-256" in str(end)


def test_the_command_line_sends_files_and_fetches_outputs(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("b\na\n")
    allowed = [f"--allow-unenforced={name}" for name in cluster.unenforced()]

    def outrider(*words: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [sys.executable, "-m", "outrider", *words], capture_output=True, check=False,
            env={**os.environ, "OUTRIDER_CONFIG": str(cluster.local.config_path)},
        )  # fmt: skip

    done = outrider(
        "submit", "--wait", "--id", "cli-files", "--cpu", "100m", "--memory", "64Mi", *allowed,
        "--input", f"data.csv={tmp_path / 'data.csv'}", "--output", "sorted.csv",
        "--", "sh", "-c", "sort in/data.csv > sorted.csv",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    target = tmp_path / "sorted.csv"
    done = outrider("result", "cli-files", "--output", "sorted.csv", "--to", str(target))
    assert done.returncode == 0, done.stderr
    assert target.read_text() == "a\nb\n"
    missing = outrider("result", "cli-files", "--output", "other")
    assert missing.returncode == 3 and b"sorted.csv" in missing.stderr
    usage = outrider("result", "cli-files", "--usage").stdout.decode()
    assert "CPU time" in usage and "output sorted.csv" in usage
    told = json.loads(outrider("result", "cli-files", "--json").stdout)["result"]
    assert told["outputs"][0]["name"] == "sorted.csv" and told["usage"]["wall_ms"] >= 0
