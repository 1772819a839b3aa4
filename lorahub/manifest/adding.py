"""``lorahub add`` and ``lorahub remove``: one line of the manifest, and the lock along with it.

Everything is decided before anything is written: an adapter that the policy refuses changes neither file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from lorahub.composing.asked import as_word
from lorahub.errors import ManifestError, UsageError, WriteFailed
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.files.atomic import atomic_write, write_failed
from lorahub.files.locks import Lock as Held
from lorahub.hub import open_hub
from lorahub.manifest import editing
from lorahub.manifest.document import FILENAME, Manifest, name_of
from lorahub.manifest.lockfile import Lock
from lorahub.manifest.locking import Locked, relock
from lorahub.manifest.project import Project, find
from lorahub.names import Ref, as_version, did_you_mean, printable

__all__ = ["add", "remove"]

_NEW = "# The adapters of this project: lorahub add, lorahub sync.\n"


def add(
    *refs: Source,
    base: Source | None = None,
    name: str | None = None,
    verdict: str | None = None,
    no_lock: bool = False,
    manifest: str | os.PathLike[str] | None = None,
    hub: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
) -> Locked:
    """Write adapters into the manifest, which is made where there is none, and lock them; no weights are downloaded.

    A reference without a selector is written with the newest version and what is compatible with it: ``@~=1.2``.

    Args:
        refs: adapters: ``[NAME=]ns/name[@SELECTOR][/path][:WEIGHT]`` or a folder of the project.
        base: what they are for; replaces the one that the manifest names.
        name: what the one adapter is called; None takes the reference's own name, or its last part.
        verdict: the worst that is accepted from now on, "exact", "compatible" or "unverified"; None leaves it.
        no_lock: only write them down, as they are given.
        manifest: its file or folder; None takes the nearest ``lorahub.toml``, or makes one here.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: nothing was given, or a name does not do.
        ManifestError: the manifest is none, or cannot be edited safely; the hint is what to write.
        Degraded, BaseMismatch, Incompatible: see ``lorahub.lock``; nothing was written.
        NotFound, AccessDenied, Offline, Unavailable: it cannot be had from here.
    """
    if not refs and base is None and verdict is None:
        raise UsageError("nothing was given to add", "lorahub add NS/NAME, or lorahub add --base ORG/NAME")
    if name is not None and len(refs) != 1:
        raise UsageError("--name is for one adapter", "name several as NAME=NS/NAME")
    path, text = _manifest(manifest)
    if verdict is not None:
        text = editing.with_verdict(text, verdict)
    if base is not None:
        text = editing.with_base(text, _from_manifest(as_ref(base, bare=True), path))
    for each in refs:
        ref = as_ref(each)
        document = Manifest.from_text(text, where=os.fspath(path))
        chosen = _name(name, ref, document)
        bare = replace(ref, name=None, weight=None)
        if ref.repo is not None and ref.selector is None and not no_lock:
            bare = _with_range(bare, hub, local_files_only)
        text = editing.with_adapter(text, chosen, _from_manifest(bare, path), ref.weight)
    return _written(path, text, no_lock=no_lock, hub=hub, local_files_only=local_files_only, progress=progress)


def remove(
    *names: str,
    no_lock: bool = False,
    manifest: str | os.PathLike[str] | None = None,
    hub: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
) -> Locked:
    """Take adapters out of the manifest and its lock; their folders go with the next ``sync``.

    Args:
        names: what the manifest calls them.
        no_lock: leave the lock as it is.
        manifest: its file or folder; None takes the nearest ``lorahub.toml`` from the current folder upwards.
        hub: path of a folder hub.
        local_files_only: use the cache alone.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: there is no such adapter.
        ManifestError: a composition needs it, or the manifest cannot be edited safely; nothing was written.
    """
    project = Project.open(manifest)
    if not names:
        raise UsageError("nothing was given to remove", "lorahub remove NAME")
    text = project.path.read_bytes().decode()
    for each in names:
        if each not in project.manifest.adapters:
            raise UsageError(
                f"{project.path.name} has no adapter '{printable(each)}'."
                f"{did_you_mean(each, project.manifest.adapters)}",
                f"it has {', '.join(project.manifest.adapters)}" if project.manifest.adapters else "",
            )
        users = [name for name, made in project.manifest.compositions.items() if each in made.adapters]
        if users:
            raise ManifestError(
                f"{each} goes into {', '.join(users)}, so it cannot be removed alone; nothing was written",
                f"take it out of [compositions.{users[0]}] in {project.path} first",
            )
        text = editing.without_adapter(text, each)
    return _written(project.path, text, no_lock=no_lock, hub=hub, local_files_only=local_files_only, progress=progress)


def _manifest(manifest: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """The manifest's place and text; those of a new one where there is none."""
    if manifest is not None and not Path(manifest).exists():
        return Path(manifest), _NEW
    if manifest is not None and Path(manifest).is_dir() and not (Path(manifest) / FILENAME).exists():
        return Path(manifest) / FILENAME, _NEW
    path = find(manifest)
    if path is None:
        return Path(FILENAME), _NEW
    Manifest.load(path)  # what is wrong with it is said before anything else
    return path, path.read_bytes().decode()


def _written(
    path: Path, text: str, *, no_lock: bool, hub: str | None, local_files_only: bool, progress: Progress
) -> Locked:
    """Decide, then write the manifest and its lock."""
    project = Project(path=path, manifest=Manifest.from_text(text, where=os.fspath(path)))
    before = path.read_bytes() if path.exists() else None
    held = _held(path.absolute().parent)
    try:

        def write() -> None:
            if (path.read_bytes() if path.exists() else None) != before:
                raise WriteFailed(f"{path} was changed by another meanwhile; nothing was written", "try again")
            atomic_write(path.resolve(), text.encode())  # a link stays one

        if not no_lock:
            return relock(project, hub=hub, local_files_only=local_files_only, progress=progress, before=write)
        write()
        lock = project.lock() or Lock(manifest=project.manifest.fingerprint())
        return Locked(path=project.lock_path, lock=lock, changes=())
    finally:
        held.release()


def _held(folder: Path) -> Held:
    try:
        return Held(folder)
    except OSError as error:
        raise write_failed(folder / FILENAME, error) from None


def _name(given: str | None, ref: Ref, manifest: Manifest) -> str:
    """What an adapter is called: as it is said, or the last part of its reference, which may be taken."""
    said = given or ref.name
    if said is not None:
        try:
            return name_of(said)
        except ValueError as error:
            raise UsageError(str(error), "lorahub add ... --name NAME") from None
    last = (ref.subpath or ref.repo or Path(ref.path or "").resolve().name).rpartition("/")[2]
    word = as_word(last.removesuffix(".safetensors")).rstrip(".")
    same = manifest.entries().get(word)
    if same is not None and _place(same.reference()) == _place(ref):
        return word  # another version of what is there
    taken = {each.casefold() for each in [*manifest.adapters, *manifest.compositions]}
    return next(each for each in _tries(word) if each.casefold() not in taken)


def _tries(word: str) -> Iterator[str]:
    yield word
    yield from (f"{word}-{number}" for number in count(2))


def _place(ref: Ref) -> tuple[str | None, str]:
    return ref.repo, ref.subpath


def _with_range(ref: Ref, hub: str | None, local_files_only: bool) -> Ref:
    """The reference with the range that its newest version opens; as it is where there is no version."""
    pin = open_hub(hub, local_files_only=local_files_only).resolve(ref)
    version = as_version(pin.version) if pin.version else None
    if version is None or len(version.release) < 2:
        return ref
    return replace(ref, selector=f"~={version.release[0]}.{version.release[1]}")


def _from_manifest(ref: Ref, manifest: Path) -> str:
    """A reference as the manifest has it: a path starts at its folder.

    Raises:
        ManifestError: a path that no other machine has.
    """
    if ref.path is None:
        return str(replace(ref, name=None, weight=None))
    if ref.path.startswith("~"):
        raise ManifestError(f"{ref.path} is a path on one machine", "keep the adapter within the project, or push it")
    relative = Path(os.path.relpath(Path(ref.path).absolute(), manifest.absolute().parent)).as_posix()
    return relative if relative.startswith("..") or relative == "." else f"./{relative}"
