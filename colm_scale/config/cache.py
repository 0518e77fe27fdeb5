"""The folder of caches, an environment variable rather than an option: it belongs to the machine, not to a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "COLM_SCALE_CACHE"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the absolute path: ``COLM_SCALE_CACHE``, or else ``colm_scale`` among the user's caches."""
    home = environ.get("HOME") or os.path.expanduser("~")  # stays "~", a folder of "/", for a user without a home
    caches = environ.get("XDG_CACHE_HOME") or Path("/", home, ".cache")
    return Path(environ.get(CACHE_VARIABLE) or Path(caches, "colm_scale")).absolute()
