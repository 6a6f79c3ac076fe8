"""Units: names carry them (`_ms`, `_bytes`, `_millis`), people may write `512Mi`, `1.5`, `30s`.

Quantities follow the Kubernetes notation (resource.Quantity): `m` is a thousandth, `Ki Mi Gi Ti`
are powers of 1024, `k M G T` powers of 1000.
"""

import re
from typing import Final

from idl.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

_BYTES: Final = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": 1024 * GIB,
}  # fmt: skip
_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_NUMBER: Final = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")


def _split(text: str | float, what: str, example: str) -> tuple[float, str]:
    match = _NUMBER.match(str(text))
    if match is None:
        raise ConfigError(f"{what} {text!r} is not a quantity; write it like {example}")
    return float(match[1]), match[2]


def parse_bytes(text: str | float) -> int:
    """`"512Mi"` → bytes. Raises ConfigError."""
    number, unit = _split(text, "size", "512Mi or 2G")
    if unit not in _BYTES:
        raise ConfigError(f"size {text!r} has an unknown unit; use one of k M G T Ki Mi Gi Ti")
    return int(number * _BYTES[unit])


def parse_cpu_millis(text: str | float) -> int:
    """`"500m"` or `"1.5"` CPUs → thousandths of a CPU. Raises ConfigError."""
    number, unit = _split(text, "cpu", "2, 0.5 or 500m")
    if unit not in ("", "m"):
        raise ConfigError(f"cpu {text!r} has an unknown unit; write 2, 0.5 or 500m")
    return round(number if unit == "m" else number * 1000)


def parse_ms(text: str | float) -> int:
    """`"30s"`, `"5m"`, `"250ms"` → milliseconds; a bare number is seconds. Raises ConfigError."""
    number, unit = _split(text, "duration", "30s, 5m or 250ms")
    if unit not in _MS and unit != "":
        raise ConfigError(f"duration {text!r} has an unknown unit; use ms, s, m, h or d")
    return int(number * _MS.get(unit or "s", 1000))


def format_bytes(count: int) -> str:
    """Bytes for people: `268435456` → `"256Mi"`."""
    size = float(count)
    for unit in ("", "Ki", "Mi", "Gi"):
        if size < 1024:
            return f"{size:.4g}{unit}"
        size /= 1024
    return f"{size:.4g}Ti"


def format_ms(duration_ms: float) -> str:
    """Milliseconds for people: `1500` → `"1.5s"`."""
    if duration_ms < 1000:
        return f"{duration_ms:.0f}ms"
    if duration_ms < 120_000:
        return f"{duration_ms / 1000:.3g}s"
    return f"{duration_ms / 60_000:.3g}m"
