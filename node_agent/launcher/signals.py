"""The C half of the standard library's ``signal``: its wrappers make enums, and import ``enum``."""

from __future__ import annotations

TYPE_CHECKING = False  # typing is another import
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

__all__ = ["signal"]
