"""Folders that were pulled, on this machine: each complete and verified, or not there.

An entry is one pin's files in a folder, and beside it ``pin.json`` with their hashes and what they looked like when
they were verified.  It is filled in a staging folder under a lock and renamed into place, so a killed pull leaves
nothing that could be taken for an entry; the next pull of the same pin goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock

from lorahub.errors import DigestMismatch, LorahubError, RecordError, WriteFailed
from lorahub.files.atomic import atomic_write, flush, flush_folder, is_partial, replace_dir, write_failed
from lorahub.files.digest import file_digest, git_blob_sha1
from lorahub.files.user import cache_root
from lorahub.hub.hub import FilePin, Pin
from lorahub.hub.versions import version_tags
from lorahub.names import printable

__all__ = ["Cache", "Fetch", "Refs", "pin_of"]

Fetch: TypeAlias = Callable[[str, FilePin, Path], None]
"""Brings one file: (path in the pin, its content, where to write it).  What lies there already is a start of it."""

_PIN, _REFS, _LISTING = "pin.json", "refs.json", "listing.json"
_REFS_KEYS = ("tags", "branches", "known")


def pin_of(folder: Path) -> Pin | None:
    """The pin that a pulled folder came from, every sha256 known; None for any other folder."""
    entry = _read_entry(folder.parent)
    return entry.pin if entry is not None and folder.name == _leaf(entry.pin) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """Tags and branches of a repository (name -> commit) as a hub last listed them.

    Attributes:
        tags, branches: as listed.
        known: version tags at the commits where this machine first saw them, or accepted them since; what a hub lists
            later does not change them.
    """

    tags: Mapping[str, str]
    branches: Mapping[str, str]
    known: Mapping[str, str] = field(default_factory=dict)

    @property
    def trusted(self) -> dict[str, str]:
        """The tags, the versions among them at the commits where they are known."""
        return {tag: self.known.get(tag, commit) for tag, commit in self.tags.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    pin: Pin
    seen: Mapping[str, list[int]]  # path -> [size, mtime in nanoseconds] when the file was verified


@dataclass(frozen=True, slots=True)
class Cache:
    """Pulled folders below ``root``; ``hub`` in the methods is a name that is a folder name, one for each hub."""

    root: Path

    @classmethod
    def default(cls) -> Cache:
        """The cache of this user, see ``cache_root``."""
        return cls(cache_root())

    def folder(self, hub: str, pin: Pin) -> Path | None:
        """The complete folder of ``pin``, or None.

        Files that look as they did when they were verified are not hashed again.
        """
        place = self._place(hub, pin)
        entry = _read_entry(place)
        if entry is None or entry.pin.files.keys() != pin.files.keys():
            return None
        if not all(entry.pin.files[path].agrees(pin.files[path]) for path in pin.files):
            return None
        folder = place / _leaf(pin)
        if _files_below(folder) != set(pin.files):
            return None
        looks = {path: _look(folder / path) for path in pin.files}
        if None in looks.values():  # a link or a folder where the file was
            return None
        touched = [path for path in pin.files if looks[path] != entry.seen.get(path)]
        if not all(_verified(folder / path, entry.pin.files[path]) for path in touched):
            return None
        if touched:
            with suppress(LorahubError):  # a cache that cannot be written hashes again next time
                _write_entry(place, entry.pin, looks)
        return folder

    def find(self, hub: str, repo: str, commit: str, path: str, *, holds: str = "adapter") -> Pin | None:
        """The pin of a complete folder that was pulled from ``path`` of ``repo`` at ``commit``, or None."""
        for place in sorted(self._repo(hub, repo).glob(f"{commit}/*/{_PIN}")):
            entry = _read_entry(place.parent)
            if entry is None or (entry.pin.path, entry.pin.holds) != (path, holds):
                continue
            if (entry.pin.repo, entry.pin.commit) == (repo, commit) and self.folder(hub, entry.pin):
                return entry.pin
        return None

    def commits(self, hub: str, repo: str) -> list[str]:
        """The commits of ``repo`` of which something complete was pulled."""
        places = self._repo(hub, repo).glob(f"*/*/{_PIN}")
        return sorted({place.parts[-3] for place in places if not is_partial(place.parts[-2])})

    def missing(self, hub: str, pin: Pin) -> list[str]:
        """The files of ``pin`` of which not all bytes are here; whether the others are sound is not looked at."""
        place = self._place(hub, pin)
        folders = [place / _leaf(pin), _staging(place) / _leaf(pin)]
        looks = {path: [_look(folder / path) or [-1] for folder in folders] for path in pin.files}
        return [path for path, file in pin.files.items() if file.size not in {look[0] for look in looks[path]}]

    def fill(self, hub: str, pin: Pin, fetch: Fetch) -> Path:
        """The complete folder of ``pin``, each file fetched where it is missing and verified.

        A file that arrives wrong is fetched once more, then nothing of it is kept.

        Raises:
            DigestMismatch: a file is not what the pin says, twice.
            WriteFailed: the cache cannot be written, or has too little room for what is missing.
        """
        place = self._place(hub, pin)
        staging = _staging(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.with_name(f".{place.name}.lock")):
                if (folder := self.folder(hub, pin)) is not None:  # another process was faster
                    return folder
                if place.exists() and not staging.exists():  # damaged, or of other files: what is sound of it stays
                    place.rename(staging)
                _demand_room(place.parent, staging / _leaf(pin), pin)
                self._fill_staging(staging, pin, fetch)
                if place.exists():
                    shutil.rmtree(place)
                replace_dir(staging, place)
        except OSError as error:
            raise write_failed(place, error) from None
        return place / _leaf(pin)

    def _fill_staging(self, staging: Path, pin: Pin, fetch: Fetch) -> None:
        folder = staging / _leaf(pin)
        for part in (staging, folder):
            if part.is_symlink() or part.is_file():
                part.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        for path in _files_below(staging) - {f"{folder.name}/{path}" for path in pin.files}:
            (staging / path).unlink()  # what an earlier attempt left, or a pin of other files
        files, seen = {}, {}
        try:
            for path, file in pin.files.items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                files[path] = _bring(path, file, target, fetch)
                with target.open("rb", buffering=0) as opened:
                    flush(opened)
                flush_folder(target.parent)
                seen[path] = _look(target)
        except DigestMismatch:
            shutil.rmtree(staging)
            raise
        _write_entry(staging, pin.with_files(files), seen)

    def remember_refs(self, hub: str, repo: str, tags: Mapping[str, str], branches: Mapping[str, str]) -> Refs:
        """Keep what a hub listed, for when it cannot be asked; a version that is known already stays where it was."""
        with self._held(hub, repo):
            old = self.refs(hub, repo)
            seen = {each.tag: each.commit for each in version_tags(tags)}
            refs = Refs(tags=dict(tags), branches=dict(branches), known=seen | dict(old.known if old else {}))
            if refs != old:
                self._write_refs(hub, repo, refs)
        return refs

    def trust(self, hub: str, repo: str, tag: str, commit: str) -> None:
        """From now on the version ``tag`` is known to be ``commit``."""
        with self._held(hub, repo):
            old = self.refs(hub, repo) or Refs(tags={}, branches={})
            self._write_refs(hub, repo, replace(old, tags={**old.tags, tag: commit}, known={**old.known, tag: commit}))

    @contextmanager
    def _held(self, hub: str, repo: str) -> Iterator[None]:
        """What is known of the refs is read and replaced by one process at a time: no version is forgotten."""
        place = self._repo(hub, repo)
        with ExitStack() as held:
            with suppress(OSError, NotImplementedError):  # as for refs, and on a file system without locks
                place.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(place / f".{_REFS}.lock"))
            yield

    def _write_refs(self, hub: str, repo: str, refs: Refs) -> None:
        place = self._repo(hub, repo) / _REFS
        with suppress(OSError, LorahubError):  # a cache that cannot be written is no reason not to resolve
            place.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({name: dict(getattr(refs, name)) for name in _REFS_KEYS}, indent=1, sort_keys=True)
            atomic_write(place, text.encode())

    def refs(self, hub: str, repo: str) -> Refs | None:
        """What the hub last listed, or None."""
        data = _read_json(self._repo(hub, repo) / _REFS)
        if not {"tags", "branches"} <= data.keys() <= {*_REFS_KEYS}:
            return None
        refs = Refs(**data)
        return refs if all(isinstance(each, str) for names in data.values() for each in names.values()) else None

    def remember_listing(self, hub: str, repo: str, commit: str, files: Mapping[str, FilePin]) -> None:
        """Keep the files of a commit, which never change."""
        place = self._repo(hub, repo) / commit / _LISTING
        with suppress(OSError, LorahubError):  # as for refs
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(place, Pin(repo=repo, commit=commit, files=files).dumps().encode())

    def listing(self, hub: str, repo: str, commit: str) -> Mapping[str, FilePin] | None:
        """The files of a commit as a hub listed them once, or None."""
        try:
            pin = Pin.loads((self._repo(hub, repo) / commit / _LISTING).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecordError):
            return None
        return pin.files if (pin.repo, pin.commit) == (repo, commit) else None

    def _repo(self, hub: str, repo: str) -> Path:
        return self.root / "pulled" / hub / repo.replace("/", "--")

    def _place(self, hub: str, pin: Pin) -> Path:
        part = hashlib.sha256(f"{pin.holds}\0{pin.subfolder}\0{pin.file}".encode()).hexdigest()[:12]
        return self._repo(hub, pin.repo) / pin.commit / (part if pin.path or pin.holds != "adapter" else "whole")


def _staging(place: Path) -> Path:
    """Where an entry is filled: always the same, so that the next pull of it goes on there."""
    return place.with_name(f".lorahub-{place.name}.partial")


def _leaf(pin: Pin) -> str:
    """What the folder itself is called: what people will see at the end of the path."""
    return (pin.subfolder or pin.repo).rpartition("/")[2]


def _demand_room(parent: Path, folder: Path, pin: Pin) -> None:
    """Refuse to begin what cannot be finished: the disk must have room for what is not here yet."""
    here = {path: _look(folder / path) or [0] for path in pin.files}
    missing = pin.size - sum(min(here[path][0], file.size) for path, file in pin.files.items())
    free = shutil.disk_usage(parent).free
    if missing > free:
        raise WriteFailed(
            f"{pin} needs {missing:,} more bytes, and the disk with {parent} has {free:,} free",
            "Free some space, or keep the cache on another disk: LORAHUB_CACHE=FOLDER",
        )


def _bring(path: str, file: FilePin, target: Path, fetch: Fetch) -> FilePin:
    """The file at ``target`` with its sha256, fetched if need be."""
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    for _ in range(2):
        if _look(target) is None or target.stat().st_size != file.size:
            fetch(path, file, target)
        if (found := _verified(target, file)) is not None:
            return found
        target.unlink(missing_ok=True)
    raise DigestMismatch(
        f"{printable(path)} did not arrive as it was listed: its content differs from the recorded hash",
        "Nothing of it was kept.  Try again later; if it stays so, the hub or something on the way alters files.",
    )


def _verified(path: Path, file: FilePin) -> FilePin | None:
    """The full entry of the file at ``path`` if its content is that of ``file``."""
    try:
        sha256, size = file_digest(path)
        git = git_blob_sha1(path) if file.git is not None else None
    except LorahubError:  # it is not there, cannot be read, or changes under our hands
        return None
    found = FilePin(size=size, sha256=sha256, git=git)
    return found if found.agrees(file) else None


def _look(path: Path) -> list[int] | None:
    if path.is_symlink() or not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _read_json(path: Path) -> dict[str, dict[str, str]]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) and all(isinstance(value, dict) for value in data.values()) else {}


def _write_entry(place: Path, pin: Pin, seen: Mapping[str, list[int] | None]) -> None:
    text = json.dumps({"pin": pin.document(), "seen": dict(seen)}, indent=1, sort_keys=True)
    atomic_write(place / _PIN, text.encode())


def _read_entry(place: Path) -> _Entry | None:
    data = _read_json(place / _PIN)
    try:
        return _Entry(pin=Pin.from_json(data.get("pin")), seen=dict(data.get("seen", {})))  # type: ignore[arg-type]
    except RecordError:
        return None
