"""A pulled folder, copied to where people want it: whole or not at all, each copy held against the pin."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorahub.errors import DigestMismatch, WriteFailed
from lorahub.files.atomic import flush, flush_folder, new_staging, replace_dir, write_failed
from lorahub.files.digest import file_digest
from lorahub.hub.cache import pin_of
from lorahub.hub.hub import Pin

__all__ = ["put_at"]


def put_at(folder: Path, dest: Path) -> Path:
    """Copy a pulled folder to ``dest``, which then holds its files and nothing else; returns ``dest``.

    A copy, not a link: who edits it leaves the cache alone.  Where ``dest`` holds just these files, nothing is done.

    Raises:
        WriteFailed: ``dest`` holds something else, or cannot be written; it stays as it was.
        DigestMismatch: a copy is not what was pulled.
    """
    pin = pin_of(folder)
    assert pin is not None  # a folder that a hub's pull gave
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        if _holds(dest, pin):
            return dest
        raise WriteFailed(
            f"{dest} holds something else than {pin}, and nothing there is overwritten", "Name a folder that is empty."
        )
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        staging = new_staging(dest)
        try:
            for path in pin.files:
                _copy(folder / path, staging / path)
            _demand(staging, pin, dest)
            replace_dir(staging, dest)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise write_failed(dest, error) from None
    return dest


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb", buffering=0) as file:
        flush(file)
    flush_folder(target.parent)


def _demand(staging: Path, pin: Pin, dest: Path) -> None:
    if not _holds(staging, pin):
        raise DigestMismatch(f"the copy of {pin} for {dest} is not what was pulled", "Look at the disk.")


def _holds(folder: Path, pin: Pin) -> bool:
    """Whether the files of ``pin`` lie there, and nothing else."""
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    if there.keys() != pin.files.keys() or any(path.is_symlink() for path in there.values()):
        return False
    return all(file_digest(there[path]) == (file.sha256, file.size) for path, file in pin.files.items())
