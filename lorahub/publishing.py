"""Recording and publishing, for scripts: write down what is known, then push it as a version."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub import checks, recording
from lorahub.adapter import open_header
from lorahub.deltas.disputes import as_compat
from lorahub.errors import PushRefused, UsageError
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.files.atomic import atomic_write
from lorahub.formats.peft.configless import CONFIG_MISSING
from lorahub.hub import open_hub
from lorahub.hub.contents import survey
from lorahub.merging.preparing import prepare
from lorahub.opening import Base
from lorahub.plugins import load_registry
from lorahub.records import FILENAME, AdapterRecord

if TYPE_CHECKING:
    from torch import nn

    from lorahub.hub.hub import Pin

__all__ = ["Pushed", "push", "record"]


def record(
    folder: str | os.PathLike[str],
    base: Source | nn.Module | Base | None = None,
    *,
    base_repo: str | None = None,
    base_revision: str | None = None,
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
    **fields: object,
) -> AdapterRecord:
    """Write ``lorahub.json`` into an adapter folder: its base, its arithmetic, the digests of its files; no torch.

    Args:
        folder: the adapter's folder.
        base: the base it was trained on; None keeps what an earlier record says, and brings the rest up to date.
        base_repo: what a local base is called on the Hub.
        base_revision: its commit there, 40 hex digits.
        compat: "peft" or "strict": whose result counts where PEFT's is not the declared one; recorded where it matters.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all) while the base is hashed.
        fields: further record fields, as ``license="apache-2.0"``; None removes one.

    Raises:
        BaseMismatch: the adapter does not fit the base, so this is not the one it was made for.
        RecordError: a field does not follow the schema; nothing was written.
    """
    registry = load_registry()
    choice = as_compat(compat)
    header = open_header(Path(folder), registry, compat=choice)
    unknown = [finding for finding in header.findings if finding.code == CONFIG_MISSING]
    checks.refuse(unknown, subject=f"a record of {header.label}")
    described, planned = None, None
    if base is not None:
        job = prepare(base, {header.label: header}, compat=choice, hub=hub, progress=progress)
        fitting = [finding for finding in job.plan.findings if finding.axis == "placement"]
        if not header.reading.groups:  # parts alone, which land nowhere
            fitting = [finding for finding in fitting if finding.code != "nothing-lands"]
        checks.refuse(fitting, subject=f"{header.label} was not made for {job.base.index.ref}")
        header, planned = job.headers[header.label], job.plan
        touched = {step.source for step in planned.steps if step.source}
        described = recording.describe_base(
            job.base.index, job.base.framework, touched, repo=base_repo, revision=base_revision
        )
        described = recording.keep_name(described, header.record)
    elif base_repo or base_revision:
        raise UsageError(
            "a name for the base was given, but no base", "name it too: --base FOLDER or --base NS/NAME@COMMIT"
        )
    written = recording.make_record(header, registry, base=described, plan=planned, fields=fields)
    atomic_write(Path(folder) / FILENAME, written.to_json().encode())
    return written


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push published, or would: the pin, and the files it left out."""

    pin: Pin
    skipped: tuple[str, ...]


def push(
    folder: str | os.PathLike[str],
    ref: Source,
    *,
    version: str | None = None,
    message: str = "",
    dry_run: bool = False,
    hub: str | None = None,
    progress: Progress = quiet,
) -> Pushed:
    """Publish an adapter folder as one commit and one immutable version; no torch.

    The version, and the name where the record has none, are written into the folder's ``lorahub.json`` first.

    Args:
        folder: the adapter's folder, with a record that is up to date.
        ref: ``ns/name``.
        version: as "1.2.0"; None keeps the record's.
        message: commit message.
        dry_run: say what would be published; write nothing, anywhere.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        progress: called with (bytes done, bytes in all).

    Raises:
        PushRefused: the record is missing, stale or incomplete, the folder holds what must not be published, or the
            version exists with other content; nothing was published.
    """
    folder, to = Path(folder), as_ref(ref)
    if to.repo is None:
        raise UsageError(f"{ref} is not a name on a hub", "lorahub push NS/NAME FOLDER --version 1.0.0")
    header = open_header(folder, load_registry())
    surveyed = survey(folder)
    surveyed.demand()
    again = f"lorahub record {folder}"
    if header.record is None:
        raise PushRefused(
            f"{folder} has no {FILENAME}, so nobody could check it against a base",
            f"{again} --base BASE --license SPDX",
        )
    if stale := header.record.stale(folder):
        raise PushRefused(f"the record of {folder} is stale: {', '.join(stale)} changed since", again)
    ready = header.record.changed(
        version=version or header.record.version, name=header.record.name or to.repo.partition("/")[2]
    )
    if missing := ready.missing_for_push():
        options = {
            "version": "lorahub push ... --version 1.0.0",
            "license": f"{again} --license SPDX",
            "base.repo_id": f"{again} --base BASE",
        }
        raise PushRefused(
            f"the record of {folder} lacks what a published adapter needs: {', '.join(missing)}",
            "; ".join(options[key] for key in missing if key in options) or again,
        )
    opened = open_hub(hub)
    before = (folder / FILENAME).read_bytes()
    if not dry_run:
        atomic_write(folder / FILENAME, ready.to_json().encode())
    try:
        pin = opened.push(
            folder,
            to,
            version=ready.version,
            message=message,
            dry_run=dry_run,
            progress=lambda _file, done, total: progress(done, total),
        )
    except BaseException:  # a refused version must not stay in the record
        atomic_write(folder / FILENAME, before)
        raise
    return Pushed(pin=pin, skipped=tuple(sorted(surveyed.skipped)))
