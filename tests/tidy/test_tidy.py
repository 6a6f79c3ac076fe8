"""The habits of this code base that a program can check, so that no reviewer has to."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("idl", "dataplane", "controlplane", "node_agent", "outrider", "chaos")
FILE_LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 70
TABLES: Final = {"node_agent/sandbox/syscall_table.py"}
"""Data, not code: exempt from the line bound."""
IMPURE: Final = {
    "asyncio", "concurrent", "confluent_kafka", "cyclonedds", "ctypes", "http", "io", "kubernetes",
    "multiprocessing", "os", "pathlib", "prometheus_client", "random", "secrets", "select",
    "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time", "urllib",
    "uuid", "uvloop", "logging",
}  # fmt: skip


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


CODE: Final = _sources(*PACKAGES, "benchmarks")
CORES: Final = [p for p in CODE if "core" in p.parts] + _sources("chaos/demo/account.py")


def _imports(tree: ast.Module) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def test_there_is_something_to_check() -> None:
    assert len(CODE) > 30
    assert {p.parts[-3] for p in CORES if p.parent.name == "core"} >= {
        "dataplane", "controlplane", "node_agent",
    }  # fmt: skip


@pytest.mark.parametrize("path", CORES, ids=_name)
def test_a_core_is_pure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not _imports(tree) & IMPURE
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, waits)]
    calls = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_files_and_functions_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what lives here and why"
    if _name(path) not in TABLES:
        assert len(text.splitlines()) <= FILE_LINES_MAX
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_no_silent_except(path: Path) -> None:
    """An except that does nothing says why, in a comment."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass) for s in node.body):
            told = any("#" in line for line in lines[node.lineno - 1 : node.end_lineno])
            assert told, f"line {node.lineno}: an except that does nothing and does not say why"


def test_suppressions_carry_their_reason() -> None:
    bare = re.compile(r"#\s*(noqa(: ?[A-Z0-9, ]+)?|type: ignore(\[[^\]]*\])?)\s*$")
    found = [
        f"{_name(path)}:{number}"
        for path in CODE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    assert not found


def test_who_may_import_whom() -> None:
    """The contracts are in pyproject.toml ([tool.importlinter])."""
    tool = Path(sys.executable).parent / "lint-imports"
    run = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_launcher_needs_the_standard_library_only() -> None:
    for path in _sources("node_agent/launcher"):
        ours = {p.stem for p in _sources("node_agent/launcher")}
        foreign = _imports(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - ours
        assert not foreign - {"node_agent"}, f"{_name(path)} imports {foreign}"


def test_nothing_names_a_registry_or_a_path_of_a_machine() -> None:
    hosts = "|".join(
        ("py" + "pi.org", "python" + "hosted", "maven.apache.org/" + "maven2", "proxy.go" + "lang",
         "registry.npm" + "js", "deb.de" + "bian.org", "/ro" + "ot/.pyenv", "/wo" + "rk/main")
    )  # fmt: skip
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    found = [
        name
        for name in tracked
        if name and (ROOT / name).is_file()
        and re.search(hosts, (ROOT / name).read_bytes().decode("utf-8", "replace"))
    ]  # fmt: skip
    assert not found
