"""`Client.map`: a self-contained Python function as jobs, without pickles.

What travels is the function's source (`inspect.getsource`) and, as payload, one JSON item; what
comes back is one JSON value. Nothing that a job writes is ever executed or unpickled here: jobs
are untrusted, and unpickling runs code of whoever wrote the bytes. The price: the function must
stand alone (imports inside it, no closures, no globals), its arguments and value must be JSON.
Annotations may name anything: the program does not evaluate them.
"""

import ast
import builtins
import inspect
import json
import symtable
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from idl.errors import ConfigError
from outrider.client.job import Job

PYTHON: Final = "python3"
"""Interpreter on the nodes: jobs do not see the submitter's virtual environment."""

_RUNNER: Final = """
from __future__ import annotations
import json, os, sys
{source}
_value = {name}(json.load(sys.stdin))
with open(os.environ["OUTRIDER_RESULT"], "w") as _file:
    json.dump(_value, _file)
"""


def function_source(function: Callable[[Any], Any]) -> str:
    """The program that reads an item from stdin and writes the value. Raises ConfigError."""
    name = getattr(function, "__name__", "")
    if not inspect.isfunction(function) or not name.isidentifier():
        raise ConfigError("map takes a function made by `def`, not a lambda, method or class")
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"the source of {name!r} is not to be had; define it in a file"
        ) from error
    if source.lstrip().startswith("@"):
        raise ConfigError(f"function {name!r} is decorated; map takes a plain one")
    missing = sorted(_outside(tree, name))
    if missing:
        raise ConfigError(
            f"function {name!r} uses {', '.join(missing)} from outside itself; import and define "
            "what it needs inside it, or pass it in the item"
        )
    return _RUNNER.format(source=source, name=name)


class _Unannotated(ast.NodeTransformer):
    """Leaves out what the program does not evaluate."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))


def _outside(tree: ast.Module, name: str) -> set[str]:
    """Names that the function needs from outside, when it is defined (its defaults) or called, in
    functions, classes and comprehensions within it, too. Itself it may call."""
    bare = ast.unparse(ast.fix_missing_locations(_Unannotated().visit(tree)))
    module = symtable.symtable(bare, name, "exec")
    used = _globals_of(module)
    for table in module.get_children():
        used |= _globals_below(table) - {name}
    return used - set(dir(builtins))


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    return {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_global() and symbol.is_referenced() and not symbol.is_assigned()
    }


def _globals_below(table: symtable.SymbolTable) -> set[str]:
    return _globals_of(table).union(*map(_globals_below, table.get_children()))


def function_jobs(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    python: str = PYTHON,
    **options: Any,
) -> Iterator[Job]:
    """One job per item. Raises ConfigError (the function, an item that is not JSON, an option)."""
    program = function_source(function)
    options.setdefault("name", getattr(function, "__name__", "map"))
    for index, item in enumerate(items):
        try:
            payload = json.dumps(item).encode()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"item {index} is not JSON: {error}") from error
        try:
            yield Job([python, "-c", program], payload=payload, **options)
        except TypeError as error:
            raise ConfigError(f"map: {error}") from error


def function_value(result: bytes) -> Any:
    """The value that the function returned. Raises ConfigError where the job wrote none."""
    try:
        return json.loads(result)
    except ValueError as error:
        raise ConfigError("the job's result is not the JSON value that map writes") from error
