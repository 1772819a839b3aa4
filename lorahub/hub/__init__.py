"""Folders that travel: hubs, pins, what may be pushed, what was pulled.  Knows no adapters and no torch."""

from __future__ import annotations

import os
from pathlib import Path

from lorahub.hub.cache import Cache
from lorahub.hub.hub import Hub

__all__ = ["open_hub"]


def open_hub(
    hub: str | Path | None = None,
    *,
    token: str | None = None,
    local_files_only: bool = False,
    cache: Cache | None = None,
) -> Hub:
    """The hub that ``hub`` names: a folder, or Hugging Face ("hf", or the address of a server like it).

    None means ``LORAHUB_HUB``, and Hugging Face where that is not set.  A folder need not exist before the first push.

    Raises:
        UsageError: the address may not be used, or the folder holds something else.
    """
    name = os.fspath(hub) if hub is not None else os.environ.get("LORAHUB_HUB", "")
    if name in {"", "hf", "huggingface", "huggingface.co"} or name.startswith(("http://", "https://")):
        from lorahub.hub.huggingface import HuggingFaceHub  # noqa: PLC0415 - slow to import, and a folder needs none of it

        endpoint = name if "://" in name else None
        return HuggingFaceHub(endpoint=endpoint, token=token, local_files_only=local_files_only, cache=cache)
    from lorahub.hub.folder import FolderHub  # noqa: PLC0415 - as above

    return FolderHub(Path(name).expanduser(), cache=cache)
