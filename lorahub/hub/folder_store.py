"""How a folder hub lies on disk: content-addressed blobs, commits, refs.  Decides nothing.

    lorahub-hub.json                          what this is, and in which version
    blobs/ab/<sha256>                         file contents
    repos/<ns>/<name>/commits/<40 hex>.json   canonical JSON of files, message and parent; its sha1 is its name
    repos/<ns>/<name>/refs.json               branches and tags, replaced as a whole
    locks/                                    one for each repository, held while its refs change

Contents are on the disk before a commit names them, and a commit before a ref does; refs change in one rename.  So a
push that is killed anywhere leaves the hub as it was, perhaps with a few contents that nothing names yet.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from lorahub.errors import DigestMismatch, IntegrityError, NotFound, RecordError, UsageError
from lorahub.files.atomic import atomic_write, flush, flush_folder, is_partial, new_partial, put_in_place
from lorahub.files.digest import file_digest
from lorahub.files.raw import CHUNK, open_regular, write_at
from lorahub.hub.hub import FilePin
from lorahub.names import COMMIT, Ref, did_you_mean

__all__ = ["Commit", "FolderStore", "State"]

_MARK, _SCHEMA = "lorahub-hub.json", "1"
_ABANDONED = 24 * 3600  # seconds since anything was written to a blob that is not there yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One state of a repository: path -> content, a message, and the commit before it (None for the first)."""

    files: Mapping[str, FilePin]
    message: str
    parent: str | None

    def dumps(self) -> bytes:
        """Canonical JSON: the same state has the same bytes, and so the same id."""
        files = {path: {"sha256": file.sha256, "size": file.size} for path, file in self.files.items()}
        data = {"files": files, "message": self.message, "parent": self.parent}
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    @property
    def id(self) -> str:
        """40 hex digits."""
        return hashlib.sha1(self.dumps(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The refs of one repository: name -> commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


class FolderStore:
    """The folder ``root``; it need not exist to be read as empty.

    Raises:
        UsageError: it is a file, holds something else, or is of a version that is not known here.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is a file, not a folder hub", "Name a folder: --hub PATH")
        mark = self.root / _MARK
        schema = _read_json(mark).get("schema") if mark.exists() else None
        if schema not in {None, _SCHEMA}:
            raise UsageError(f"{root} is a folder hub of version {schema}; this lorahub knows version {_SCHEMA}")
        if schema is None and root.is_dir() and not all(is_partial(entry.name) for entry in root.iterdir()):
            raise UsageError(f"{root} is not empty and not a folder hub", "Name another folder: --hub PATH")

    # ------------------------------------------------------------------------------------------------- reading

    def repos(self) -> list[str]:
        """Every repository, sorted."""
        return sorted("/".join(place.parts[-3:-1]) for place in self.root.glob("repos/*/*/refs.json"))

    def state(self, repo: str, *, missing_ok: bool = False) -> State:
        """The refs of a repository; empty for one that does not exist if ``missing_ok``.

        Raises:
            NotFound: there is no such repository.
            IntegrityError: its refs are damaged.
        """
        place = self._repo(repo) / "refs.json"
        if not place.exists():
            if missing_ok:
                return State(branches={}, tags={})
            hint = did_you_mean(repo, self.repos()).strip()
            if not self.root.exists():
                hint = "There is no hub in that folder yet; the first push makes one."
            elif Path(repo).is_dir():
                hint = f"To use the folder that lies here, write ./{repo}"
            raise NotFound(f"there is no {repo} in {self.root}", hint)
        data = _read_json(place)
        refs = [data.get("branches"), data.get("tags")]
        if not all(isinstance(each, dict) and all(map(_is_commit, each.values())) for each in refs):
            raise IntegrityError(f"{place} is damaged: it should map branches and tags to commits")
        return State(branches=data["branches"], tags=data["tags"])

    def commit(self, repo: str, commit: str) -> Commit:
        """One commit of a repository.

        Raises:
            NotFound: there is no such commit.
            IntegrityError: its file is damaged.
        """
        place = self._repo(repo) / "commits" / f"{commit}.json"
        if not place.exists():
            raise NotFound(f"{repo} has no commit {commit}")
        data = _read(place)
        if hashlib.sha1(data, usedforsecurity=False).hexdigest() != commit:
            raise DigestMismatch(f"{place} is damaged: its content is not that of the commit")
        try:
            found = json.loads(data)
            files = {path: FilePin(size=each["size"], sha256=each["sha256"]) for path, each in found["files"].items()}
            return Commit(files=files, message=found["message"], parent=found["parent"])
        except (ValueError, KeyError, TypeError, AttributeError, RecordError):
            raise IntegrityError(f"{place} is damaged: it is no commit") from None

    def blob(self, file: FilePin) -> Path:
        """Where the content lies."""
        assert file.sha256 is not None
        return self.root / "blobs" / file.sha256[:2] / file.sha256

    # ------------------------------------------------------------------------------------------------- writing

    def create(self) -> None:
        """Make the folder a hub, if it is none yet."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / _MARK).exists():
            atomic_write(self.root / _MARK, json.dumps({"schema": _SCHEMA}).encode())
        for part in ("blobs", "locks", "repos"):
            (self.root / part).mkdir(exist_ok=True)

    def lock(self, repo: str) -> BaseFileLock:
        """The lock to hold while the refs of ``repo`` are read and replaced."""
        return FileLock(self.root / "locks" / f"{repo.replace('/', '--')}.lock")

    def store(self, source: Path | bytes, file: FilePin) -> None:
        """Copy a file, or content, among the blobs, unless it is there and sound.

        Raises:
            IntegrityError: it is not what it was when it was hashed.
            OSError: as the system gives it.
        """
        blob = self.blob(file)
        if blob.exists() and file_digest(blob) == (file.sha256, file.size):
            return
        blob.parent.mkdir(exist_ok=True)
        flush_folder(blob.parent.parent)
        _clear(blob.parent)
        copy, partial = new_partial(blob)
        try:
            with copy:
                same = _copy(source, copy) == file.sha256
                flush(copy)
            if same:
                put_in_place(partial, blob)
        finally:
            partial.unlink(missing_ok=True)
        if not same:
            raise IntegrityError(f"{source!s} changed while it was pushed; nothing was published", "Push again.")

    def write(self, repo: str, state: State, commit: Commit | None = None) -> None:
        """Make a commit last, then the refs.  Hold the lock.

        Raises:
            WriteFailed, OSError: the refs are as they were.
        """
        place = self._repo(repo)
        (place / "commits").mkdir(parents=True, exist_ok=True)
        flush_folder(place)
        flush_folder(place.parent)
        flush_folder(place.parent.parent)
        if commit is not None:
            atomic_write(place / "commits" / f"{commit.id}.json", commit.dumps())
        refs = {"branches": dict(state.branches), "tags": dict(state.tags)}
        atomic_write(place / "refs.json", json.dumps(refs, indent=1, sort_keys=True).encode())

    def _repo(self, repo: str) -> Path:
        Ref(repo=repo)  # what is no repository's name must not become a path
        return self.root.joinpath("repos", *repo.split("/"))


def _clear(folder: Path) -> None:
    """Remove what killed pushes left among some blobs; what anyone still writes is younger than that."""
    for entry in folder.iterdir():
        with suppress(OSError):  # another push was faster, or it is not ours to remove
            if is_partial(entry.name) and time.time() - entry.stat().st_mtime > _ABANDONED:
                entry.unlink()


def _copy(source: Path | bytes, target: io.FileIO) -> str:
    """Copy a file that must not have become a link since it was looked at; the sha256 of what was copied."""
    if isinstance(source, bytes):
        write_at(target, 0, source)
        return hashlib.sha256(source).hexdigest()
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    sha = hashlib.sha256()
    with os.fdopen(os.open(source, flags), "rb", buffering=0) as opened:
        while chunk := opened.read(CHUNK):
            target.write(chunk)
            sha.update(chunk)
    return sha.hexdigest()


def _is_commit(value: object) -> bool:
    return isinstance(value, str) and COMMIT.fullmatch(value) is not None


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.readall()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise IntegrityError(f"{path} is damaged: it is not a JSON object")
    return data
