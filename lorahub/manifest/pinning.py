"""From one entry of a manifest to what is locked of it: a commit or a folder, and the sha256 of every file.

No weights are downloaded: hubs list the sha256 of large files, and small ones are read whole and verified.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorahub import strict_json
from lorahub.errors import IntegrityError, LorahubError, NotFound
from lorahub.files.digest import file_digest
from lorahub.files.raw import open_regular
from lorahub.findings import Finding
from lorahub.front_matter import front_matter
from lorahub.hub.contents import survey
from lorahub.hub.hub import FilePin, Hub, Pin
from lorahub.hub.noticed import moved
from lorahub.hub.selection import Selection, select_adapter
from lorahub.hub.versions import pick
from lorahub.manifest.lockfile import LockedAdapter, LockedFile
from lorahub.names import Ref, Selector, printable
from lorahub.records import FILENAME as RECORD

__all__ = ["Pinned", "against", "local_files", "pin_entry", "satisfies"]

_CARD = "README.md"
_LARGEST = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """What an entry came to: what is locked of it, why, and what was noticed on the way."""

    locked: LockedAdapter
    why: str
    said: tuple[Finding, ...] = ()


def pin_entry(hub: Callable[[], Hub], folder: Path, name: str, requested: str) -> Pinned:
    """Resolve one reference of a manifest.

    Args:
        hub: opens the hub; asked only where the reference is not a path.
        folder: the manifest's.
        name: what it is called.
        requested: the reference as written.

    Raises:
        NotFound, AccessDenied, Offline, Unavailable, IntegrityError: it cannot be had from here.
    """
    try:
        return _pinned(hub, folder, name, requested)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise IntegrityError(f"{name}, {printable(requested)}, cannot be locked: {problem}") from None


def _pinned(hub: Callable[[], Hub], folder: Path, name: str, requested: str) -> Pinned:
    ref = Ref.parse(requested)
    if ref.path is not None:
        chosen, path = local_files(folder, ref.path)
        files = _locked_files(chosen.files)
        own = folder / path / chosen.subfolder
        locked = LockedAdapter(
            name=name,
            requested=requested,
            path=path,
            weight_name=chosen.file or None,
            digest=Pin(repo="local/it", commit="0" * 40, files=chosen.files).digest(),
            license=_license(lambda each: _head(own / each) if each in chosen.files else b""),
            file=files,
        )
        return Pinned(locked=locked, why="a folder of this project")
    opened = hub()
    pin = _known(opened, opened.resolve(ref))
    locked = LockedAdapter(
        name=name,
        requested=requested,
        repo=pin.repo,
        resolved=pin.tag or (_branch(pin.branch) if pin.branch else pin.commit),
        version=pin.version,
        commit=pin.commit,
        subfolder=pin.subfolder or None,
        weight_name=pin.file or None,
        digest=pin.digest(),
        license=_license(lambda each: _whole(opened, pin, each) if each in pin.files else b""),
        file=_locked_files(pin.files),
    )
    return Pinned(locked=locked, why=pin.why, said=pin.said)


def against(old: LockedAdapter, new: Pinned) -> Pinned:
    """What an entry came to, with what the lock knows of its version: a machine that never saw it cannot tell."""
    now, before = new.locked, old.commit or ""
    same = old.repo is not None and old.pin().tag is not None and (old.repo, old.resolved) == (now.repo, now.resolved)
    if not same or before == now.commit or any(each.code == "tag-moved" for each in new.said):
        return new
    ref, tag = Ref.parse(now.requested), now.resolved or ""
    said = moved(ref, tag, before, now.commit or "", when="when it was locked")
    return replace(new, said=(*new.said, said))


def satisfies(ref: Ref, locked: LockedAdapter) -> bool:
    """Whether what is locked is still something that a hub's reference means, without asking the hub."""
    if ref.repo is None or (ref.repo, ref.subpath) != (locked.repo, locked.pin().path):
        return False
    resolved, commit = locked.resolved or "", locked.commit or ""
    branch = resolved.removeprefix("refs/heads/") if resolved.startswith("refs/") else ""
    tags = {resolved: commit} if resolved not in {branch, commit} and not branch else {}
    selector = Selector.parse(ref.selector) if ref.selector is not None else None
    with suppress(LorahubError):  # nothing that is locked fits
        return pick(selector, tags, {branch: commit} if branch else {}, branch or "main").commit == commit
    return False


def local_files(folder: Path, path: str) -> tuple[Selection, str]:
    """The files of an adapter at a local path, with their digests, and the path of its folder.

    Links, leftovers of training and files that no adapter has are left out.

    Raises:
        NotFound: there is no adapter.
    """
    place = folder / path
    if not place.exists():
        raise NotFound(f"there is no adapter at {path}, which the manifest names", f"it would be {place}")
    file = place.name if place.is_file() else ""
    if file:
        place, path = place.parent, os.path.dirname(path)  # noqa: PTH120 - Path would drop the leading "./"
    listed = survey(place).files
    listing = {each: FilePin(size=found.size, sha256="0" * 64) for each, found in listed.items()}
    chosen = select_adapter(listing, file, repo=path)
    known = {each: FilePin(size=size, sha256=sha) for each in chosen.files for sha, size in [file_digest(place / each)]}
    return replace(chosen, files=known), path


def _branch(branch: str) -> str:
    return branch if branch.startswith("refs/") else f"refs/heads/{branch}"


def _locked_files(files: Mapping[str, FilePin]) -> tuple[LockedFile, ...]:
    return tuple(LockedFile(path=path, size=pin.size, sha256=pin.sha256 or "") for path, pin in files.items())


def _known(hub: Hub, pin: Pin) -> Pin:
    """The pin with every sha256: what the hub lists only by git's id is read, and verified by that."""
    unknown = {path: file for path, file in pin.files.items() if file.sha256 is None}
    learnt = {
        path: replace(file, sha256=hashlib.sha256(_whole(hub, pin, path)).hexdigest()) for path, file in unknown.items()
    }
    return pin.with_files({**pin.files, **learnt})


def _whole(hub: Hub, pin: Pin, path: str) -> bytes:
    size = pin.files[path].size
    return hub.read_many(pin, path, [(0, size)]).parts[0] if size else b""


def _head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_LARGEST) or b""


def _license(read: Callable[[str], bytes]) -> str | None:
    """The licence that the record states, or else the model card; None where neither does or can be read."""
    record: Any = {}
    with suppress(strict_json.NotStrict):  # a record that is none states none; the check speaks of it
        record = strict_json.read(read(RECORD) or b"{}", limit=_LARGEST)
    for said in (record if isinstance(record, dict) else {}, front_matter(read(_CARD).decode("utf-8", "replace"))):
        text = said.get("license")
        if isinstance(text, str) and text.strip():
            return printable(text.strip().lower())[:96]
    return None
