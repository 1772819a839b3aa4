"""The folder that adapters are installed into: one folder each, which appears whole or not at all.

Beside them lies ``.lorahub/``: what was installed here, by name, and what is being written.  A folder is ours where it
holds what is written there of it and nothing else; nothing else is ever replaced or removed.  A killed run leaves at
most unfinished folders there, which the next run clears away.  Knows files and no hub.

The layout is the one that vLLM's filesystem resolver reads: ``DEST/NAME/adapter_config.json``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, final

from filelock import FileLock

from lorahub.errors import LorahubError, WriteFailed
from lorahub.files.atomic import atomic_write, flush_folder, is_partial, new_staging, replace_dir, write_failed
from lorahub.files.digest import file_digest

__all__ = ["STATE", "Condition", "Dest", "Files", "Installed"]

STATE = ".lorahub"

Files: TypeAlias = Mapping[str, tuple[int, str]]
"""Path -> (size, sha256)."""

Condition: TypeAlias = Literal["absent", "right", "ours", "theirs", "changed", "foreign"]
"""How a folder is: not there; as it should be; another state that we installed; that, changed since; not from us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What is written down of one folder.

    Attributes:
        manifest: whose it is: the way from here to the manifest.
        states: key -> files; two while one is being replaced by the other, the newer behind.
        seen: path -> [size, mtime in nanoseconds] when the newest was verified.
    """

    manifest: str
    states: Mapping[str, Files]
    seen: Mapping[str, list[int]]

    @property
    def newest(self) -> tuple[str, Files]:
        """Key and files of the state that was installed last."""
        return list(self.states.items())[-1]


@final
@dataclass(frozen=True, slots=True)
class Dest:
    """The folder ``root`` and what is installed in it, of the manifest that lies at ``manifest`` from here."""

    root: Path
    manifest: str

    def names(self) -> list[str]:
        """What this manifest has installed here, sorted."""
        places = (self.root / STATE).glob("*.json")
        found = {place.stem: self.installed(place.stem) for place in places}
        return sorted(name for name, each in found.items() if each is not None and each.manifest == self.manifest)

    def unfinished(self) -> list[Path]:
        """What a run that was killed left, or one that is under way has."""
        state = self.root / STATE
        return [entry for entry in state.iterdir() if is_partial(entry.name)] if state.is_dir() else []

    def installed(self, name: str) -> Installed | None:
        """What is written down of a folder, or None."""
        try:
            data = json.loads(self._note(name).read_bytes())
            states = {
                str(key): {str(path): (int(size), str(sha)) for path, (size, sha) in files.items()}
                for key, files in data["states"]
            }
            seen = {str(path): [int(each) for each in look] for path, look in data["seen"].items()}
            found = Installed(manifest=str(data["manifest"]), states=states, seen=seen)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not there, or not ours
            return None
        return found if states else None

    def condition(self, name: str, wanted: Files | None) -> Condition:
        """How the folder of that name is, held against the files it should have (None: any others).

        Files that look as they did when they were verified are not hashed again.
        """
        place, note = self.root / name, self.installed(name)
        if not os.path.lexists(place):
            return "absent"
        if place.is_symlink() or not place.is_dir():
            return "foreign"
        if wanted is not None and note is not None and note.newest[1] == wanted:
            seen = {path: _look(place / path) for path in wanted}
            if None not in seen.values() and seen == note.seen:
                return "right"
        if wanted is not None and all(_is(place / path, *file) for path, file in wanted.items()):
            return "right"
        if note is None:
            return "foreign"
        present = below(place)
        ours = any(
            present <= set(files) and all(_is(place / path, *files[path]) for path in present)
            for files in note.states.values()
        )
        if not ours:
            return "changed"
        return "theirs" if self._other(note) is not None else "ours"

    def _other(self, note: Installed) -> Path | None:
        """The manifest that installed a folder here, where it is another one and still there."""
        theirs, own = self.root / note.manifest, self.root / self.manifest
        return theirs if note.manifest != self.manifest and theirs.exists() and not _same(theirs, own) else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time; what a killed one left unfinished is cleared away.

        Raises:
            WriteFailed: nothing can be written here.
        """
        state = self.root / STATE
        try:
            state.mkdir(parents=True, exist_ok=True)
            with FileLock(state / "lock"):
                for entry in self.unfinished():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                yield
        except OSError as error:
            raise write_failed(self.root, error) from None

    def install(self, name: str, fill: Callable[[Path], str]) -> Files:
        """Put a new folder in place of what is absent or ours; to be called while held.

        Args:
            name: of the folder.
            fill: makes the folder that it is given, which does not exist yet, with all its files, and says by what
                key it will be known.

        Raises:
            WriteFailed: it cannot be written; what was there is there.
        """
        state, place = self.root / STATE, self.root / name
        staging = new_staging(state / name)
        fresh = staging / name
        try:
            key = fill(fresh)
            _flush(fresh)
            files = {path: _content(fresh / path) for path in sorted(below(fresh))}
            note = self.installed(name)
            before = {each: old for each, old in (note.states if note else {}).items() if old != files}
            self._write(name, {**before, key: files}, {})
            self._exchange(fresh, place, staging / f"{name}.old")
        except OSError as error:
            raise write_failed(place, error) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # what is left of it goes with the next run
        self.remember(name, key, files)
        return files

    def remember(self, name: str, key: str, files: Files) -> None:
        """Write down that the folder holds these files, as they look now."""
        looks = {path: _look(self.root / name / path) for path in files}
        self._write(name, {key: files}, {path: look for path, look in looks.items() if look is not None})

    def remove(self, name: str) -> bool:
        """Remove a folder that is ours and unchanged, to be called while held; False where it is not."""
        condition = self.condition(name, None)
        if condition in {"changed", "foreign"}:
            return False
        try:
            if condition != "absent":
                trash = new_staging(self.root / STATE / name)
                (self.root / name).rename(trash / name)
                flush_folder(self.root)
                self._note(name).unlink(missing_ok=True)
                shutil.rmtree(trash)
            self._note(name).unlink(missing_ok=True)
        except OSError as error:
            raise write_failed(self.root / name, error) from None
        return True

    def refuse(self, name: str, condition: Condition) -> WriteFailed:
        """The error for a folder that may not be replaced."""
        place, note = self.root / name, self.installed(name)
        if condition == "theirs" and note is not None:
            return WriteFailed(
                f"{place} is what {os.path.normpath(self.root / note.manifest)} has installed there, and this manifest "
                "locks something else under that name; nothing in it was touched",
                "install into a folder of its own: lorahub sync --dest DIR; or give it another name in the manifest",
            )
        why = "was changed since it was installed" if condition == "changed" else "is not from lorahub sync"
        return WriteFailed(
            f"{place} {why}, and it is not what is locked; nothing in it was touched",
            f"move it away, or remove it if nobody needs it: rm -r {shlex.quote(str(place))}; then: lorahub sync",
        )

    @staticmethod
    def _exchange(fresh: Path, place: Path, old: Path) -> None:
        """Put a folder in place of another, or leave that where it is."""
        if not os.path.lexists(place):
            replace_dir(fresh, place)
            return
        place.rename(old)
        try:
            replace_dir(fresh, place)
        except BaseException:
            old.rename(place)
            raise

    def _note(self, name: str) -> Path:
        return self.root / STATE / f"{name}.json"

    def _write(self, name: str, states: Mapping[str, Files], seen: Mapping[str, list[int]]) -> None:
        document = {
            "manifest": self.manifest,
            "states": [[key, {path: list(file) for path, file in files.items()}] for key, files in states.items()],
            "seen": dict(seen),
        }
        atomic_write(self._note(name), json.dumps(document, indent=1).encode())


def below(folder: Path) -> set[str]:
    """Every file and link below a folder, relative to it; no link is followed."""
    found = set()
    for root, folders, files in os.walk(folder):
        links = [each for each in folders if (Path(root) / each).is_symlink()]
        found |= {(Path(root) / each).relative_to(folder).as_posix() for each in [*files, *links]}
    return found


def _is(path: Path, size: int, sha256: str) -> bool:
    if (look := _look(path)) is None or look[0] != size:
        return False
    with suppress(LorahubError):  # it cannot be read, or changes under our hands
        return file_digest(path) == (sha256, size)
    return False


def _content(path: Path) -> tuple[int, str]:
    sha256, size = file_digest(path)
    return size, sha256


def _look(path: Path) -> list[int] | None:
    if path.is_symlink() or not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _flush(folder: Path) -> None:
    """Bring a folder with everything below to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        flush_folder(Path(root))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False
