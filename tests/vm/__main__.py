"""`python -m tests.vm [pytest arguments]`: the agent's suite in the guest.

Exit codes: pytest's own; 124 past `--limit`; 77 (automake's) where no guest can be had here, with
`skipped: reason`, which `make test-vm` takes as success, because nothing was found wrong.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from idl.errors import PlatformFaultError
from tests import patience
from tests.vm.guest import run_in_guest
from tests.vm.parts import Unavailable, find_parts

EXIT_SKIPPED: Final = 77
EXIT_TIMED_OUT: Final = 124
LIMIT_S: Final = 5_400.0
"""Against a guest that hangs; several times what a quiet machine of two cores takes."""
SLOWER: Final = 10
"""Waits of tests are that much longer: the guest is that much slower than its host."""
TEST_LIMIT_S: Final = 1_800
"""Of one test, for pytest-timeout: emulation is slow, above all beside other work."""
SUITE: Final = (
    "tests/vm/test_guest.py",
    "tests/attacks",
    "tests/integration/test_agent_process.py",
    *(f"tests/integration/test_sandbox_{part}.py"
      for part in ("adopted", "devices", "files", "limits", "native", "oci", "prepared")),
    "tests/integration/test_oci_children.py",
    "tests/unit/test_sandbox_cgroups.py",
    "tests/unit/test_sandbox_plan.py",
    "tests/unit/test_sandbox_seccomp.py",
    "tests/unit/test_topology_node.py",
    "tests/e2e/test_jobs.py",
)  # fmt: skip
"""Whatever depends on the kernel, its cgroups or the machine's shape; and one cluster."""


def main(argv: list[str]) -> int:
    """Runs it. `argv`: `--limit`, `--results`, then what pytest gets instead of SUITE."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for the whole guest")
    parser.add_argument("--results", type=Path, help="where console and junit.xml are kept")
    options, chosen = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    shared = Path(tempfile.mkdtemp(prefix="outrider-vm-"))
    try:
        parts = find_parts()
        print(f"guest: {parts.kernel.name}, cgroup v2, 2 NUMA nodes, emulated", flush=True)
        os.environ["PYTEST_TIMEOUT"] = str(TEST_LIMIT_S)
        os.environ["PYTHONPATH"] = str(Path.cwd())
        os.environ[patience.VARIABLE] = str(SLOWER)
        python = str(Path(".venv/bin/python").absolute())
        command = [
            python if Path(python).exists() else sys.executable, "-m", "pytest", "-q", "--color=no",
            "-p", "no:cacheprovider", "--junitxml=/vm/junit.xml", *(chosen or SUITE),
        ]  # fmt: skip
        status = run_in_guest(
            parts, command, shared, options.limit, lambda line: print(line, flush=True)
        )
        if options.results:
            options.results.mkdir(parents=True, exist_ok=True)
            for name in ("console", "junit.xml"):
                if (shared / name).exists():
                    shutil.copy(shared / name, options.results / name)
    except Unavailable as error:
        print(f"skipped: {error}")
        return EXIT_SKIPPED
    except PlatformFaultError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    if status is None:
        print(f"the guest was not done within {options.limit:g} s", file=sys.stderr)
        return EXIT_TIMED_OUT
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
