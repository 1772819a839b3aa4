"""Where lorahub keeps what it can make again on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """``LORAHUB_CACHE``, or ``lorahub`` in the platform's folder for caches; need not exist."""
    if chosen := os.environ.get("LORAHUB_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "lorahub"
