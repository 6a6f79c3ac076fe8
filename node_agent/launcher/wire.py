"""JSON by the C half of the standard library's ``json`` package, without the package.

Importing ``json`` brings in ``re`` and ``enum``, which would be a fifth of the launcher's
memory.
"""

from __future__ import annotations

import _json

TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class _Scanning:
    """What the C scanner asks of a ``json.JSONDecoder``."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


_scan = _json.make_scanner(_Scanning)  # type: ignore[arg-type] # typed as if it took itself


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no place in a message")


# markers (none: messages hold no cycles), default, strings, indent, separators, sort, skip, NaN
_encode = _json.make_encoder(
    None, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, False
)


def loads(data: bytes) -> dict[str, Any]:
    """One message. Raises ValueError if it is none."""
    text = data.decode().strip()
    try:
        message, end = _scan(text, 0)
    except (StopIteration, ImportError, SystemError, ValueError):
        # For most errors the scanner wants json.decoder's exception, which is not there.
        raise ValueError("not JSON") from None
    if end != len(text) or not isinstance(message, dict):
        raise ValueError("not one JSON object")
    return message


def dumps(message: Mapping[str, object]) -> bytes:
    """One message as bytes. Raises TypeError for what JSON has no form for."""
    return "".join(_encode(message, 0)).encode()
