"""Where downloaded or copied broker files are kept between runs."""

import os
from pathlib import Path

from idl.errors import PlatformFaultError


def cache_directory() -> Path:
    """`$OUTRIDER_CACHE`, else `$XDG_CACHE_HOME/outrider`, else `~/.cache/outrider`; created.

    Raises PlatformFaultError where it cannot be written.
    """
    own = os.environ.get("OUTRIDER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    path = Path(own) if own else Path(base or Path.home() / ".cache") / "outrider"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformFaultError(
            f"cache directory {path} cannot be created ({error.strerror}); set OUTRIDER_CACHE"
        ) from error
    return path
