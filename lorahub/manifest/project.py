"""A manifest's file, found and read, and where everything that belongs to it lies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lorahub.errors import NotFound, UsageError
from lorahub.manifest import lockfile
from lorahub.manifest.document import FILENAME, Manifest
from lorahub.manifest.lockfile import Lock

__all__ = ["Project", "find"]

INSTALLED = "adapters"
"""The folder beside a manifest that adapters are installed into where no other is named."""


def find(manifest: str | os.PathLike[str] | None = None) -> Path | None:
    """The manifest that is named, or the nearest one from the current folder upwards; None where there is none.

    Raises:
        NotFound: the one that is named is not there.
    """
    if manifest is not None:
        path = Path(manifest)
        path = path / FILENAME if path.is_dir() else path
        if not path.is_file():
            raise NotFound(f"there is no manifest at {path}", "lorahub add NS/NAME   (which makes one)")
        return path
    here = Path.cwd()
    return next((path for folder in (here, *here.parents) if (path := folder / FILENAME).is_file()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A manifest and its places.

    Attributes:
        path: of the manifest.
        manifest: what it says.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, manifest: str | os.PathLike[str] | None = None) -> Self:
        """The project of the manifest that is named, or of the nearest one.

        Raises:
            UsageError: there is none from the current folder upwards.
            NotFound: the one that is named is not there.
            ManifestError: it is none.
        """
        path = find(manifest)
        if path is None:
            raise UsageError(f"there is no {FILENAME} here or above", "lorahub add NS/NAME   (which makes one)")
        return cls(path=path, manifest=Manifest.load(path))

    @property
    def folder(self) -> Path:
        """Where its paths start."""
        return self.path.parent

    @property
    def lock_path(self) -> Path:
        """Where its lock lies: ``lorahub.toml`` has ``lorahub.lock``."""
        return self.path.with_suffix(Path(lockfile.FILENAME).suffix)

    def lock(self) -> Lock | None:
        """Its lock, or None where there is none yet.

        Raises:
            RecordError: what lies there is none.
        """
        try:
            return Lock.load(self.lock_path)
        except NotFound:
            return None

    def dest(self, dest: str | os.PathLike[str] | None) -> Path:
        """Where adapters are installed: ``dest``, or the folder beside the manifest."""
        return Path(dest) if dest is not None else self.folder / INSTALLED
