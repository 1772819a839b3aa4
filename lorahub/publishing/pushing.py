"""Publishing an adapter folder as a version, with its record and its card.

The record and the card are published as given content and written into the folder once that went through, so a
refused push leaves the folder as it was.  One that was killed in between is made good by the same command again: the
content is the same, so nothing is published twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub.errors import UsageError, WriteFailed
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.files.atomic import atomic_write
from lorahub.findings import Finding, Verdict
from lorahub.hub import open_hub
from lorahub.hub.publication import branch_of
from lorahub.publishing.readiness import ready
from lorahub.publishing.their_readme import TheirReadme

if TYPE_CHECKING:
    from lorahub.hub.hub import Pin
    from lorahub.records import AdapterRecord

__all__ = ["Pushed", "push"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push published, or would.

    Attributes:
        pin: the exact state; of a pull request, with ``refs/pr/N`` as its branch.
        skipped: what stayed behind.
        others: files that were published beside the adapter's own: those of further adapters below the folder.
        record: as it was published.
        written: files that were written into the folder, or would be: the record, the card and its picture.
        url: where people look at it, or "".
        said: what there is to say of it all the same.
    """

    pin: Pin
    skipped: tuple[str, ...]
    record: AdapterRecord
    others: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    url: str = ""
    said: tuple[Finding, ...] = ()


def push(
    folder: str | os.PathLike[str],
    ref: Source,
    *,
    version: str | None = None,
    message: str = "",
    base: Source | None = None,
    license: str | None = None,  # noqa: A002 - what the record calls it
    private: bool = False,
    create_pr: bool = False,
    move_tag: bool = False,
    dry_run: bool = False,
    card: bool = True,
    hub: str | None = None,
    token: str | None = None,
    progress: Progress = quiet,
) -> Pushed:
    """Publish an adapter folder as one commit and one immutable version; no torch.

    A folder as a trainer left it will do: the record is made from what its files say.  The version, and the name and
    licence where the record has none, are written into ``lorahub.json``; README.md is made, or our part of it brought
    up to date; where the folder has none and the repository has, it is made around that one.

    Args:
        folder: the adapter's folder; a record in it must be up to date.
        ref: ``ns/name``, with ``@branch`` and a folder within the repository where those are meant.
        version: as "1.2.0"; None keeps the record's.
        message: commit message.
        base: what it was trained on; None keeps what is recorded, or what the adapter's own files name.
        license: SPDX identifier; None keeps the record's, or the README's.
        private: make the repository private where there is none yet; one that is public is refused.
        create_pr: propose the commit as a pull request, and tag nothing.
        move_tag: let the version mean the new content where it exists with other content.
        dry_run: say what would be published; write nothing, anywhere.
        card: whether README.md is made or brought up to date.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        token: for the hub; None takes the one that is logged in.
        progress: called with (bytes done, bytes in all).

    Raises:
        PushRefused: the folder lacks or holds what it must not, all of it in the findings; the version exists with
            other content; or somebody else's commit came first.  Nothing was published.
        BaseMismatch: the adapter does not fit ``base``.
        AccessDenied, Unavailable, Offline: the hub cannot be asked, or does not let this token write.
    """
    folder, to = Path(folder), as_ref(ref)
    if to.repo is None:
        raise UsageError(f"{ref} is not a name on a hub", "lorahub push NS/NAME FOLDER --version 1.0.0")
    branch_of(to)  # that it is one, before anything else is said
    found = ready(folder, to, version=version, base=base, license_=license, card=card, hub=hub, progress=progress)
    opened = open_hub(hub, token=token)
    theirs = TheirReadme(ready=found, to=to, card=card)
    pin = opened.push(
        folder,
        to,
        version=found.record.version,
        message=message,
        dry_run=dry_run,
        private=private,
        create_pr=create_pr,
        move_tag=move_tag,
        given=found.given,
        readme=theirs,
        progress=lambda _file, done, total: progress(done, total),
    )
    given = {**found.given, **theirs.given}
    changed = {path: data for path, data in given.items() if _content(folder / path) != data}
    failed = () if dry_run else _write(folder, changed)
    return Pushed(
        pin=pin,
        skipped=found.skipped,
        others=tuple(sorted({*found.files, *given} - pin.files.keys())),
        record=found.record,
        written=tuple(sorted(changed)),
        url=opened.page(pin),
        said=(*pin.said, *theirs.said, *failed),
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write(folder: Path, files: Mapping[str, bytes]) -> tuple[Finding, ...]:
    """Write into the folder what was published; a folder that cannot be written is no failure of the push."""
    try:
        for path, data in files.items():
            atomic_write(folder / path, data)
    except WriteFailed as error:
        return (
            Finding(
                code="folder-not-updated",
                axis="policy",
                level=Verdict.UNVERIFIED,
                message=f"it is published, but the folder does not hold all of it: {error.message}",
                where=tuple(sorted(files)),
                remedy=error.hint,
            ),
        )
    return ()
