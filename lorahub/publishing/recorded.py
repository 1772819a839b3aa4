"""Recording: what is known of an adapter's base and arithmetic, written down while it is known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub import checks, recording
from lorahub.adapter import open_header
from lorahub.deltas.disputes import as_compat
from lorahub.errors import UsageError
from lorahub.fetching import Progress, Source, quiet
from lorahub.files.atomic import atomic_write
from lorahub.formats.peft.configless import CONFIG_MISSING
from lorahub.merging.preparing import prepare
from lorahub.opening import Base
from lorahub.plugins import load_registry
from lorahub.records import FILENAME, AdapterRecord, BaseRecord

if TYPE_CHECKING:
    from torch import nn

__all__ = ["drafted", "record"]


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
        base_repo: what a local base is called on the Hub; without ``base``, the name of one that is not at hand.
        base_revision: its commit there, 40 hex digits.
        compat: "peft" or "strict": whose result counts where PEFT's is not the declared one; recorded where it matters.
        hub: path of a folder hub.
        progress: called with (bytes done, bytes in all) while the base is hashed.
        fields: further record fields, as ``license="apache-2.0"``; None removes one.

    Raises:
        BaseMismatch: the adapter does not fit the base, so this is not the one it was made for.
        RecordError: a field does not follow the schema; nothing was written.
    """
    written = drafted(
        Path(folder),
        base,
        base_repo=base_repo,
        base_revision=base_revision,
        compat=compat,
        hub=hub,
        progress=progress,
        fields=fields,
    )
    atomic_write(Path(folder) / FILENAME, written.to_json().encode())
    return written


def drafted(
    folder: Path,
    base: Source | nn.Module | Base | None = None,
    *,
    named: BaseRecord | None = None,
    base_repo: str | None = None,
    base_revision: str | None = None,
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
    fields: Mapping[str, object] | None = None,
) -> AdapterRecord:
    """The record that ``record`` would write, and nothing written.

    ``named`` is what is known of the base where it is not at hand; everything else is as for ``record``.

    Raises:
        BaseMismatch, RecordError: as ``record``.
    """
    registry = load_registry()
    choice = as_compat(compat)
    header = open_header(folder, registry, compat=choice)
    unknown = [finding for finding in header.findings if finding.code == CONFIG_MISSING]
    checks.refuse(unknown, subject=f"a record of {header.label}")
    described, planned = named, None
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
        described = _by_name(header.record, base_repo, base_revision)
    return recording.make_record(header, registry, base=described, plan=planned, fields=fields or {})


def _by_name(earlier: AdapterRecord | None, repo: str | None, revision: str | None) -> BaseRecord:
    """A base that is not at hand, by its name alone; a check will say that its weights were never recorded.

    Raises:
        UsageError: a commit of what, or the record knows more already.
        RecordError: it is no repository, or no commit.
    """
    if not repo:
        raise UsageError("a commit of the base was given, but no repository", "name it too: --base-repo NS/NAME")
    if earlier is not None and earlier.base is not None and earlier.base.weights_digest:
        raise UsageError(
            f"the record knows the base by its weights already ({earlier.base.repo_id or 'without a name'}), "
            "and a name alone would forget them",
            f"give the base itself: --base FOLDER --base-repo {repo}, or --base {repo}",
        )
    return BaseRecord.checked(repo_id=repo, **({"revision": revision} if revision else {}))
