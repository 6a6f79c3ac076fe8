"""Clock jumps without libfaketime: `python -m chaos.faults.clock FILE python -m MODULE …` runs one
of our modules with a wall clock that is off by what FILE says (8 bytes, ns, mapped).

Our processes read the wall clock through `time.time_ns`; that and `time.time` are shifted.
Monotonic clocks are left alone, as a real jump leaves them (clock_gettime(2)), and so are the
clocks inside librdkafka and Cyclone DDS.
"""

import mmap
import runpy
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_OFFSET: Final = struct.Struct("<q")
_MODULE_AT: Final = 3
"""argv after FILE: the interpreter, -m, the module."""


def write_offset(path: Path, offset_ms: int) -> None:
    """From now on the clock of who maps `path` is off by this much."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(_OFFSET.pack(offset_ms * 1_000_000))


def shifted(path: Path, real_ns: Callable[[], int]) -> Callable[[], int]:
    """A `time_ns` that adds what `path` says at each call."""
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), _OFFSET.size, prot=mmap.PROT_READ)

    def time_ns() -> int:
        return real_ns() + int(_OFFSET.unpack_from(view)[0])

    return time_ns


def main(argv: list[str]) -> None:
    """Shifts the clock, then becomes the module."""
    time_ns = shifted(Path(argv[1]), time.time_ns)
    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9
    module, rest = argv[1 + _MODULE_AT], argv[2 + _MODULE_AT :]
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv)
