"""Pressure of the node, read from files as the kernel writes them."""

from pathlib import Path

from idl.control import NodePressure
from node_agent.pressure import node_pressure

_TEXT = "some avg10={} avg60=0.10 avg300=0.00 total=5\nfull avg10=9.99 avg60=0.00 total=1\n"


def test_the_ten_second_average_of_each_resource(tmp_path: Path) -> None:
    for resource, share in (("cpu", 1.5), ("memory", 0.0), ("io", 42.25)):
        (tmp_path / resource).write_text(_TEXT.format(share))
    assert node_pressure(tmp_path) == NodePressure(cpu=1.5, memory=0.0, io=42.25)


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    assert node_pressure(tmp_path / "none") is None
