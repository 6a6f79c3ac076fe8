"""How much the whole node waits for CPU, memory and disks (PSI, /proc/pressure)."""

from pathlib import Path
from typing import Final

from idl.control import NodePressure

PRESSURE: Final = Path("/proc/pressure")


def node_pressure(folder: Path = PRESSURE) -> NodePressure | None:
    """As of now; None where this kernel does not tell (built without PSI, or `psi=0`)."""
    found: dict[str, float] = {}
    for resource in ("cpu", "memory", "io"):
        try:
            text = (folder / resource).read_text()
        except OSError:
            continue
        average = text.partition("avg10=")[2].partition(" ")[0]
        if average:
            found[resource] = float(average)
    return NodePressure(**found) if found else None
