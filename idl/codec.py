"""Bytes ↔ records, once, at the edge. Everything beyond this module is a typed Struct.

Raises InvalidRecordError with a stable `code`: `not-utf8-json`, `not-msgpack`, `invalid-spec`,
`unknown-version`, `unknown-content-type`, `empty`, `too-large`, `out-of-range`.
"""

from typing import Final, TypeVar

import msgspec

from idl.control import ControlBody
from idl.errors import InvalidRecordError, LedgerCorruptError
from idl.jobs import JobSpec, validate_spec
from idl.ledger import LEDGER_VERSION, LedgerEntry
from idl.limits import INPUTS_INLINE_BYTES_MAX, KAFKA_RECORD_BYTES_MAX, SPEC_BYTES_MAX
from idl.records import RECORD_VERSION

CONTENT_TYPE_HEADER: Final = "content-type"
JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"

_T = TypeVar("_T")
_R = TypeVar("_R", bound=msgspec.Struct)
_msgpack = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_ledger_decoder = msgspec.msgpack.Decoder(LedgerEntry)


class _Version(msgspec.Struct):
    v: int = 1


def guess_content_type(value: bytes, declared: str = "") -> str:
    """The declared type, or JSON where a record starts like an object, else msgpack."""
    if declared:
        return declared.split(";", maxsplit=1)[0].strip().lower()
    return JSON if value[:64].lstrip()[:1] == b"{" else MSGPACK


def _decode(value: bytes, content_type: str, kind: type[_T]) -> _T:
    """Raises InvalidRecordError, msgspec.MsgspecError or UnicodeDecodeError, and nothing else,
    whatever the bytes are."""
    try:
        if content_type == JSON:
            found = msgspec.json.decode(value, type=kind)
            _msgpack.encode(found)  # as the ledger will have it: integers of any size are JSON
            return found
        if content_type == MSGPACK:
            return msgspec.msgpack.decode(value, type=kind)
    except RecursionError as error:
        raise InvalidRecordError("out-of-range", "it is nested too deeply") from error
    except OverflowError as error:
        raise InvalidRecordError("out-of-range", "a number has more than 64 bits") from error
    raise InvalidRecordError(
        "unknown-content-type",
        f"content-type {content_type!r} is not known; use {JSON} or {MSGPACK}",
    )


def decode_spec(value: bytes | None, content_type: str = "") -> JobSpec:
    """A submission's bytes → a spec that passed `validate_spec`. Raises InvalidRecordError."""
    if not value:
        raise InvalidRecordError("empty", "record has no value; send a job spec as JSON or msgpack")
    if len(value) > KAFKA_RECORD_BYTES_MAX:
        raise InvalidRecordError("too-large", f"record has {len(value)} bytes; use a claim check")
    kind = guess_content_type(value, content_type)
    try:
        version = _decode(value, kind, _Version).v
        if version != 1:
            raise InvalidRecordError(
                "unknown-version", f"job record version {version} is not known"
            )
        spec = _decode(value, kind, JobSpec)
    except msgspec.ValidationError as error:
        raise InvalidRecordError("invalid-spec", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        code = "not-utf8-json" if kind == JSON else "not-msgpack"
        raise InvalidRecordError(code, f"record is not {kind}: {error}") from error
    validate_spec(spec)
    size = len(value) - len(spec.payload or b"")
    if (
        size > SPEC_BYTES_MAX
        and len(_msgpack.encode(spec)) - len(spec.payload or b"") > SPEC_BYTES_MAX
    ):
        raise InvalidRecordError(
            "too-large",
            f"spec without payload exceeds {SPEC_BYTES_MAX} bytes; put data in the payload",
        )
    inline = sum(given.size_bytes for given in spec.inputs.values() if given.ref is None)
    if inline > INPUTS_INLINE_BYTES_MAX:
        raise InvalidRecordError(
            "too-large",
            f"inputs have {inline} bytes of data, at most {INPUTS_INLINE_BYTES_MAX}; "
            "send the larger ones by claim check (ref)",
        )
    return spec


def encode(record: msgspec.Struct) -> bytes:
    """Any record of ours as msgpack."""
    return _msgpack.encode(record)


def encode_json(record: object) -> bytes:
    """Any record of ours as JSON (bytes become base64)."""
    return _json.encode(record)


def decode(value: bytes | None, kind: type[_R]) -> _R:
    """One of `idl.records` from msgpack or JSON. Raises InvalidRecordError."""
    if not value:
        raise InvalidRecordError(
            "empty", f"record has no value where a {kind.__name__} was expected"
        )
    content_type = guess_content_type(value)
    try:
        version = _decode(value, content_type, _Version).v
        if version != RECORD_VERSION:
            raise InvalidRecordError(
                "unknown-version",
                f"{kind.__name__} version {version} is not known; upgrade the reader",
            )
        return _decode(value, content_type, kind)
    except msgspec.ValidationError as error:
        raise InvalidRecordError("invalid-record", f"{kind.__name__}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRecordError("not-a-record", f"{kind.__name__}: {error}") from error


def decode_entry(offset: int, value: bytes | None) -> LedgerEntry:
    """A ledger record. Raises LedgerCorruptError: a reader must stop, never skip."""
    if not value:
        raise LedgerCorruptError(offset, "it is empty")
    try:
        version = msgspec.msgpack.decode(value, type=_Version).v
        if version != LEDGER_VERSION:
            raise LedgerCorruptError(offset, f"version {version} is not known")
        return _ledger_decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise LedgerCorruptError(offset, str(error)) from error


def encode_body(body: ControlBody) -> str:
    """A control message body as the text that an envelope carries."""
    return _json.encode(body).decode()


def decode_body(text: str, kind: type[_R]) -> _R:
    """A control message body. Raises InvalidRecordError."""
    try:
        found = msgspec.json.decode(text, type=kind)
        _msgpack.encode(found)  # as the ledger will have it: see `_decode`
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise InvalidRecordError("invalid-body", f"{kind.__name__}: {error}") from error
    return found
