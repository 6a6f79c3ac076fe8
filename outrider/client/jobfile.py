"""Job files: YAML, JSON or JSON lines; short forms (as `Job`) or the wire form (as `JobSpec`).

A file holds one job, a list of jobs, or `jobs:` with optional `defaults:`. A job that uses a key
of the wire form alone (`resources`, `limits`, `retry`, `isolation`, `payload_ref`, `v`) is read
as the wire form, as `idl/schema/job.v1.json` tells it, and may not mix in short forms.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import yaml

from idl.errors import ConfigError, InvalidRecordError
from idl.ids import QueueName, is_valid_name
from idl.jobs import JobInput, JobSpec, validate_spec
from outrider.client.job import DEFAULT_QUEUE, Job, Submission, read_file

FILE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A job file is read whole; larger batches are better sent by a program (docs/submitting.md)."""

_INPUT_KEYS: Final = frozenset({"file", "text", "data", "ref", "writable"})
_WIRE_ONLY: Final = frozenset({"resources", "limits", "retry", "isolation", "payload_ref", "v"})
_WIRE_KEYS: Final = frozenset(field.name for field in msgspec.structs.fields(JobSpec)) | {"queue"}
_PATH_KEYS: Final = {"payload_file": "payload", "script_file": "script"}
_SHORT_KEYS: Final = frozenset(f.name for f in dataclasses.fields(Job)) | frozenset(_PATH_KEYS)


def read_job_file(path: Path) -> list[Submission]:
    """Every job of the file, in its order. Raises ConfigError naming the job that is wrong."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"job file {path} is larger than {FILE_BYTES_MAX} bytes; split it")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read job file {path}: {reason}") from error
    return parse_jobs(text, str(path), suffix=path.suffix, folder=path.parent)


def parse_jobs(
    text: str, origin: str, *, suffix: str = ".yaml", folder: Path | None = None
) -> list[Submission]:
    """Jobs of a text; relative `payload_file` and `script_file` are looked up in `folder`."""
    documents = list(_documents(text, origin, suffix))
    jobs = [job for document in documents for job in _members(document, origin)]
    if not jobs:
        raise ConfigError(f"{origin} holds no job")
    return [
        _job(job, f"{origin}, job {index}" if len(jobs) > 1 else origin, folder or Path())
        for index, job in enumerate(jobs, start=1)
    ]


def _documents(text: str, origin: str, suffix: str) -> Iterator[Any]:
    try:
        if suffix == ".json":
            yield json.loads(text)
        elif suffix in (".jsonl", ".ndjson"):
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
        else:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            yield from (part for part in yaml.load_all(text, Loader=loader) if part is not None)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{origin} does not parse: {where}") from error


def _members(document: Any, origin: str) -> list[dict[str, Any]]:
    if isinstance(document, dict) and "jobs" in document:
        unknown = set(document) - {"jobs", "defaults"}
        if unknown:
            raise ConfigError(
                f"{origin}: {_first(unknown)!r} beside 'jobs'; only 'defaults' may stand there"
            )
        defaults = document.get("defaults") or {}
        found, shared = document["jobs"], defaults
    else:
        found, shared = document, {}
    members = found if isinstance(found, list) else [found]
    if not isinstance(shared, dict) or not all(isinstance(member, dict) for member in members):
        raise ConfigError(f"{origin}: a job is a mapping such as 'command: [echo, hi]'")
    return [cast("dict[str, Any]", shared | member) for member in members]


def _first(names: Iterable[Any]) -> str:
    return min(str(name) for name in names)


def _check_keys(job: dict[str, Any], known: frozenset[str], where: str) -> None:
    for key in job:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see docs/submitting.md"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _job(job: dict[str, Any], where: str, folder: Path) -> Submission:
    if _WIRE_ONLY & job.keys():
        return _wire(job, where)
    _check_keys(job, _SHORT_KEYS, where)
    values = dict(job)
    for key, target in _PATH_KEYS.items():
        if key in values:
            if target in values:
                raise ConfigError(f"{where}: both {target} and {key}; give one")
            values[target] = folder / str(values.pop(key))
    for key in ("env", "node_labels"):
        values[key] = _texts(values.get(key) or {}, f"{where}: {key}")
    values["inputs"] = _inputs(values.get("inputs") or {}, where, folder)
    if isinstance(values.get("command"), list):
        values["command"] = [_text(word) for word in values["command"]]
    if "args" in values:
        values["args"] = [_text(word) for word in values["args"] or ()]
    try:
        return Job(**values).submission()
    except (ConfigError, InvalidRecordError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _inputs(mapping: Any, where: str, folder: Path) -> dict[str, JobInput]:
    """`name: text`, or `name: {text | file | data (base64) | ref, writable}`."""
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: inputs is a mapping of names to texts or {{file: …}}")
    return {_text(name): _one_input(_text(name), given, where, folder)
            for name, given in mapping.items()}  # fmt: skip


def _one_input(name: str, given: Any, where: str, folder: Path) -> JobInput:
    if not isinstance(given, dict):
        return JobInput(data=_text(given).encode())
    _check_keys(given, _INPUT_KEYS, f"{where}: input {name}")
    rest = {key: value for key, value in given.items() if key not in ("file", "text")}
    if len(given.keys() - {"writable"}) != 1:
        raise ConfigError(f"{where}: input {name} needs one of file, text, data, ref")
    try:
        read = msgspec.convert(rest, JobInput)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: input {name}: {error}") from error
    if "file" in given:
        return msgspec.structs.replace(read, data=read_file(folder / str(given["file"]), name))
    if "text" in given:
        return msgspec.structs.replace(read, data=_text(given["text"]).encode())
    return read


def _text(value: object) -> str:
    """YAML reads `8` as a number and `true` as a truth value; a job wants what was written."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _texts(mapping: Any, where: str) -> dict[str, str]:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} is a mapping of names to values")
    return {_text(key): _text(value) for key, value in mapping.items()}


def _wire(job: dict[str, Any], where: str) -> Submission:
    short = job.keys() & (_SHORT_KEYS - _WIRE_KEYS)
    if short:
        raise ConfigError(
            f"{where} mixes the wire form ({_first(_WIRE_ONLY & job.keys())}) with the short form "
            f"({_first(short)}); use one"
        )
    _check_keys(job, _WIRE_KEYS, where)
    body = {key: value for key, value in job.items() if key != "queue"}
    queue = str(job.get("queue", DEFAULT_QUEUE))
    if not is_valid_name(queue):
        raise ConfigError(f"{where}: queue {queue!r} is not a name")
    try:
        spec = msgspec.convert(body, JobSpec)
        validate_spec(spec)
    except (msgspec.ValidationError, InvalidRecordError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return Submission(QueueName(queue), spec)
