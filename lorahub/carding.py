"""Model cards, for scripts: what a push would put into README.md, to look at or to write down beforehand."""

from __future__ import annotations

import os
from pathlib import Path

from lorahub.adapter import open_header
from lorahub.cards import FILE, Card, make_card, read_card
from lorahub.errors import UsageError
from lorahub.files.atomic import atomic_write
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.records import FILENAME

__all__ = ["card"]


def card(folder: str | os.PathLike[str], repo: str | None = None, *, write: bool = False) -> Card:
    """The model card of an adapter folder; no torch and no hub.

    The author's text and metadata are kept; lorahub's part lies between two comments and is brought up to date.

    Args:
        folder: the adapter's folder, with a record.
        repo: ``ns/name``, or ``ns/name/folder``, where it will be; the record's name by default.
        write: put README.md and its picture into the folder.

    Raises:
        UsageError: the folder has no record, or ``repo`` is no name on a hub.
        RecordError: the README cannot be read, or lorahub's part of it was changed by hand; nothing was written.
        WriteFailed: it could not be written.
    """
    folder = Path(folder)
    header = open_header(folder, load_registry())
    if header.record is None:
        raise UsageError(
            f"{folder} has no {FILENAME}, and a card says what stands there", f"lorahub record {folder} --base BASE"
        )
    name = header.record.name or header.label
    to = _to(repo or name, folder)
    made = make_card(read_card(folder), header, header.record, repo=to.repo or "", subfolder=to.subpath)
    if write:
        for picture, content in made.pictures.items():
            atomic_write(folder / picture, content)
        atomic_write(folder / FILE, made.text.encode())
    return made


def _to(name: str, folder: Path) -> Ref:
    """``name`` as a place on a hub: of nobody yet where only its own name is known."""
    ref = Ref.parse(name if "/" in name else f"NS/{name}")
    if ref.repo is None or name not in (str(ref), str(ref).partition("/")[2]) or ref.selector or ref.weight is not None:
        raise UsageError(f"{name!r} is no name on a hub", f"lorahub card {folder} --repo NS/NAME")
    return ref
