"""What the demo submits: one job per file of the Python standard library, and the hostile ones.

Each hostile job names the end it must come to; the account fails where it comes to another.
"""

import sysconfig
from pathlib import Path
from typing import Final, Literal

import msgspec

from idl.jobs import LimitName
from node_agent.sandbox.settings import interpreter
from outrider.client.job import ALL_LIMITS, Job

Expected = Literal["finished", "dead-lettered", "rejected", "cancelled"]

FILES_DEFAULT: Final = 300
"""Files of the standard library to take: some tens of seconds of work on two cores."""
FILE_BYTES_MAX: Final = 256 * 1024
START_WITHIN: Final = "20s"
"""A hostile job that no node here can hold is given up after this, with the reason."""

ANALYSE: Final = r"""
import ast, collections, hashlib, json, marshal, os, sys
source = sys.stdin.buffer.read()
tree = ast.parse(source)
code = compile(source, os.environ["FILE"], "exec")
branches = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.BoolOp, ast.comprehension)
functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
weight = lambda f: 1 + sum(isinstance(n, branches) for n in ast.walk(f))
imports = collections.Counter()
for node in ast.walk(tree):
    if isinstance(node, ast.Import):
        imports.update(a.name.split(".")[0] for a in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        imports[node.module.split(".")[0]] += 1
hardest = max(((weight(f), f.name) for f in functions), default=(0, ""))
report = {
    "file": os.environ["FILE"], "sha256": hashlib.sha256(source).hexdigest(),
    "lines": source.count(b"\n"), "functions": len(functions),
    "classes": sum(isinstance(n, ast.ClassDef) for n in ast.walk(tree)),
    "bytecode": len(marshal.dumps(code)), "imports": dict(imports),
    "hardest": hardest[1], "complexity": hardest[0],
}
with open(os.environ["OUTRIDER_RESULT"], "w") as out:
    json.dump(report, out)
"""

SNOOP: Final = r"""
import os, socket, sys
held = []
def must_fail(what, act):
    try:
        act()
    except OSError as error:
        held.append(f"{what}: {error.strerror}")
    else:
        print("NOT HELD:", what)
        sys.exit(3)
def connect(host, port):
    with socket.socket() as s:
        s.settimeout(2)
        s.connect((host, port))
must_fail("read /etc/shadow", lambda: open("/etc/shadow").read())
must_fail("list /root/.ssh", lambda: os.listdir("/root/.ssh"))
must_fail("read the cluster's secret", lambda: open(os.environ["SECRET"]).read())
must_fail("write /usr", lambda: open("/usr/outrider-was-here", "w"))
must_fail("connect to Kafka", lambda: connect("127.0.0.1", int(os.environ["BROKER_PORT"])))
must_fail("connect to the metadata address", lambda: connect("169.254.169.254", 80))
others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
if len(others) > 1:
    print("NOT HELD: sees processes", others)
    sys.exit(3)
with open(os.environ["OUTRIDER_RESULT"], "w") as out:
    out.write("; ".join(held))
"""

FLAKY: Final = """
import os, sys
attempt = int(os.environ["OUTRIDER_ATTEMPT"])
if attempt < 3:
    sys.exit(f"attempt {attempt}: not yet")
open(os.environ["OUTRIDER_RESULT"], "w").write(f"succeeded at attempt {attempt}")
"""

MEMORY_BOMB: Final = """
hoard = []
while True:
    hoard.append(bytearray(b"x" * (8 << 20)))
"""

FORK_BOMB: Final = """
import os, sys, time
children = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except OSError as error:
        open(os.environ["OUTRIDER_RESULT"], "w").write(f"stopped at {children}: {error.strerror}")
        sys.exit(0 if children < 100 else 4)
    children += 1
"""

HANG: Final = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(3600)
"""

POISON: Final = b'{"v": 1, "command": ["/bin/true"], "resources": {"cpu_millis": "lots"'


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One hostile submission. `refused_without`: the node limits it must not run without."""

    kind: str
    job: Job
    expected: Expected
    refused_without: tuple[LimitName, ...] = ()


def _python(program: str) -> tuple[str, ...]:
    return (interpreter(), "-I", "-S", "-c", program)


def library_files(count: int) -> list[Path]:
    """The first `count` files of the standard library, by name, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"}
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if not skip & set(path.relative_to(root).parts)
        and 0 < path.stat().st_size <= FILE_BYTES_MAX
    ]
    return found[:count]


def library_jobs(files: list[Path], unenforced: tuple[LimitName, ...], mark: str) -> list[Job]:
    """One job per file: the file is the payload, the job parses and compiles it."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        Job(
            _python(ANALYSE),
            id=f"stdlib-{index:03d}",
            group="stdlib",
            env={"FILE": str(path.relative_to(root)), "DEMO": mark},
            payload=path,
            cpu="500m",
            memory="192Mi",
            timeout="60s",
            allow_unenforced=unenforced,
        )
        for index, path in enumerate(files)
    ]


def hostile_cases(
    unenforced: tuple[LimitName, ...], mark: str, broker_port: int, secret: Path
) -> list[Case]:
    """The hostile ones. Those that a limit must hold are submitted as requiring it."""
    soft: dict[str, object] = {"allow_unenforced": unenforced}
    small: dict[str, object] = {
        "cpu": "250m",
        "memory": "96Mi",
        "group": "hostile",
        "env": {"DEMO": mark},
    }
    bombs = tuple(name for name in ALL_LIMITS if name in ("memory", "pids"))

    def make(kind: str, program: str, expected: Expected, needs: tuple[LimitName, ...] = (),
             **more: object) -> Case:  # fmt: skip
        held = tuple(name for name in unenforced if name not in needs)
        options = {**small, **soft, "allow_unenforced": held, **more}
        if set(needs) & set(unenforced):
            options["start_within"] = START_WITHIN  # no node will take it
        job = Job(_python(program), id=f"hostile-{kind}", **options)  # type: ignore[arg-type] # a table of keyword arguments
        return Case(kind=kind, job=job, expected=expected, refused_without=needs)

    return [
        make("flaky", FLAKY, "finished", retries=3, backoff="200ms"),
        make("memory-bomb", MEMORY_BOMB, "dead-lettered", bombs[:1]),
        make("fork-bomb", FORK_BOMB, "finished", bombs[1:], pids=50),
        make("hangs", HANG, "dead-lettered", timeout="1500ms", grace="200ms"),
        make(
            "snoops", SNOOP, "finished", retries=0,
            env={"DEMO": mark, "BROKER_PORT": str(broker_port), "SECRET": str(secret)},
        ),
        make("too-big", "pass", "dead-lettered", memory="64Ti", start_within="3s"),
    ]  # fmt: skip
