"""Where what was fetched is kept."""

from __future__ import annotations

import os
from pathlib import Path

from twinserve.settings.errors import InputError


def cache_folder(*parts: str) -> Path:
    """The folder `twinserve/PARTS` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        InputError: the user has no home folder, and none is named.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The XDG specification has relative paths ignored.
        cache = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError("expected a home folder, or a folder named by XDG_CACHE_HOME") from error
    return cache.joinpath("twinserve", *parts)
