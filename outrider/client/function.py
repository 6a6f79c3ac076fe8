"""`Client.map`: a self-contained Python function as jobs, without pickles.

What travels is the function's source (`inspect.getsource`) and, as payload, one JSON item; what
comes back is one JSON value. Nothing that a job writes is ever executed or unpickled here: jobs
are untrusted, and unpickling runs code of whoever wrote the bytes. The price: the function must
stand alone (imports inside it, no closures, no globals), its arguments and value must be JSON.
"""

import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from idl.errors import ConfigError
from outrider.client.job import Job

PYTHON: Final = "python3"
"""Interpreter on the nodes: jobs do not see the submitter's virtual environment."""

_RUNNER: Final = """
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
    outside = inspect.getclosurevars(function)
    missing = sorted({*outside.nonlocals, *outside.globals} - {name})
    if missing:
        raise ConfigError(
            f"function {name!r} uses {', '.join(missing)} from outside itself; import and define "
            "what it needs inside it, or pass it in the item"
        )
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {name!r} is not to be had; define it in a file"
        ) from error
    if source.lstrip().startswith("@"):
        raise ConfigError(f"function {name!r} is decorated; map takes a plain one")
    return _RUNNER.format(source=source, name=name)


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
