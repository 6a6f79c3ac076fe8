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
from outrider.client.job import DEFAULT_QUEUE, Job, Submission, check_text, read_file

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
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read job file {path}: {error.strerror}") from error
    return parse_jobs(data, str(path), suffix=path.suffix, folder=path.parent)


def parse_jobs(
    text: str | bytes, origin: str, *, suffix: str = ".yaml", folder: Path | None = None
) -> list[Submission]:
    """Jobs of a text; relative `payload_file` and `script_file` are looked up in `folder`."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"cannot read job file {origin}: it is not UTF-8 text") from error
    documents = list(_documents(text, origin, suffix))
    jobs = [job for document in documents for job in _members(document, origin)]
    if not jobs:
        raise ConfigError(f"{origin} holds no job")
    return [
        _job(job, f"{origin}, job {index}" if len(jobs) > 1 else origin, folder or Path())
        for index, job in enumerate(jobs, start=1)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A number, truth value or date with the text that stood there: `010`, `1.10`, `yes`."""

    value: Any
    text: str

    def __repr__(self) -> str:
        return repr(self.text)

    def __str__(self) -> str:
        return self.text


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # chosen at run time
    """Safe, and keeps what was written."""


def _keep_written(loader: Any, node: Any) -> Written:
    return Written(yaml.SafeLoader.yaml_constructors[node.tag](loader, node), node.value)


for _kind in ("int", "float", "bool", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _keep_written)


def _json(text: str) -> Any:
    return json.loads(
        text,
        parse_int=lambda number: Written(int(number), number),
        parse_float=lambda number: Written(float(number), number),
    )


def _documents(text: str, origin: str, suffix: str) -> Iterator[Any]:
    try:
        if suffix == ".json":
            yield _json(text)
        elif suffix in (".jsonl", ".ndjson"):
            yield from (_json(line) for line in text.splitlines() if line.strip())
        else:
            yield from (part for part in yaml.load_all(text, Loader=_Loader) if part is not None)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: JSON, or the 32nd of May
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
    values = {key: _plain(value) for key, value in job.items()}
    for key, target in _PATH_KEYS.items():
        if key in values:
            if target in values:
                raise ConfigError(f"{where}: both {target} and {key}; give one")
            del values[key]
            values[target] = folder / _text(job[key], f"{where}: {key}")
    for key in ("env", "node_labels"):
        values[key] = _texts(job.get(key) or {}, f"{where}: {key}")
    values["inputs"] = _inputs(job.get("inputs") or {}, where, folder)
    for key in ("command", "args"):
        values[key] = () if job.get(key) is None else _words(job[key], f"{where}: {key}")
    try:
        return Job(**values).submission()
    except (ConfigError, InvalidRecordError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _inputs(mapping: Any, where: str, folder: Path) -> dict[str, JobInput]:
    """`name: text`, or `name: {text | file | data (base64) | ref, writable}`."""
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: inputs is a mapping of names to texts or {{file: …}}")
    named = ((_text(name, f"{where}: inputs"), given) for name, given in mapping.items())
    return {name: _one_input(name, given, where, folder) for name, given in named}


def _one_input(name: str, given: Any, where: str, folder: Path) -> JobInput:
    what = f"{where}: input {name}"
    if not isinstance(given, dict):
        return JobInput(data=_text(given, what).encode())
    _check_keys(given, _INPUT_KEYS, what)
    rest = {key: _plain(value) for key, value in given.items() if key not in ("file", "text")}
    if len(given.keys() - {"writable"}) != 1:
        raise ConfigError(f"{what} needs one of file, text, data, ref")
    try:
        read = msgspec.convert(rest, JobInput)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{what}: {error}") from error
    if "file" in given:
        file = folder / _text(given["file"], what)
        return msgspec.structs.replace(read, data=read_file(file, name))
    if "text" in given:
        return msgspec.structs.replace(read, data=_text(given["text"], what).encode())
    return read


def _text(value: object, what: str) -> str:
    """What was written. Raises ConfigError for what is no scalar, and for an empty place."""
    if isinstance(value, str):
        return value
    if isinstance(value, Written):
        return value.text
    if isinstance(value, bool):  # JSON's; YAML's `yes` is `Written`
        return str(value).lower()
    if value is None:
        raise ConfigError(f"{what} has no value; write '' for an empty text, or quote \"null\"")
    raise ConfigError(f"{what} is a {type(value).__name__}, not a text; quote it")


def _texts(mapping: Any, where: str) -> dict[str, str]:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} is a mapping of names to values")
    return {_text(key, where): _text(value, f"{where} {key}") for key, value in mapping.items()}


def _words(given: Any, what: str) -> Any:
    """A list of texts; a string is left to `Job`, which knows where one may stand."""
    if isinstance(given, list):
        return [_text(word, f"{what} {index}") for index, word in enumerate(given, 1)]
    return _text(given, what)


def _plain(value: Any) -> Any:
    """The values that YAML or JSON read, where no text is meant."""
    if isinstance(value, Written):
        return value.value
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _wire(job: dict[str, Any], where: str) -> Submission:
    short = job.keys() & (_SHORT_KEYS - _WIRE_KEYS)
    if short:
        raise ConfigError(
            f"{where} mixes the wire form ({_first(_WIRE_ONLY & job.keys())}) with the short form "
            f"({_first(short)}); use one"
        )
    _check_keys(job, _WIRE_KEYS, where)
    body = {key: _plain(value) for key, value in job.items() if key != "queue"}
    queue = _text(job.get("queue", DEFAULT_QUEUE), f"{where}: queue")
    if not is_valid_name(queue):
        raise ConfigError(f"{where}: queue {queue!r} is not a name")
    try:
        spec = msgspec.convert(body, JobSpec)
        check_text(spec)
        validate_spec(spec)
    except (msgspec.ValidationError, InvalidRecordError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return Submission(QueueName(queue), spec)
