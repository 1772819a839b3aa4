"""A base that is merged into where it lies: what a killed run left is completed, and what was merged before is known.

The counterpart of ``merging`` for folders that are changed; the files themselves are ``files.journal``'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.engine.report import MergeReport
from lorahub.engine.writing.inplace import restored
from lorahub.errors import Degraded, IntegrityError, UsageError
from lorahub.fetching import Source, as_ref
from lorahub.files.journal import revert, settle
from lorahub.findings import Finding, Verdict
from lorahub.names import Ref

__all__ = ["MERGED", "demand_new", "history", "provenance_name", "settle_base", "undo"]

MERGED = "merged-already"
"""Code of the finding that an adapter is in the base already."""

_PROVENANCE = "lorahub-merge.json"
_LIMIT = 16 << 20


def settle_base(base: Source) -> MergeReport | None:
    """Complete a merge in place that was decided and not finished; its report, or None where there was none.

    Raises:
        UsageError: the base is no folder or file of this machine: a hub's cache is never changed.
        WriteFailed, IntegrityError: it cannot be completed.
    """
    about = settle(_folder(_place(base)))
    return None if about is None or about["undone"] else restored(about)


def undo(base: Source) -> MergeReport:
    """Take back the last merge in place that kept its old bytes; the report of that merge.

    Raises:
        NotFound: none was kept.
        IntegrityError: the files changed since; nothing was put back.
        WriteFailed, UsageError: as ``settle_base``.
    """
    return restored(revert(_folder(_place(base))))


def provenance_name(base: Path) -> str:
    """The file in a folder that says what was merged there; that of a single weights file carries its name."""
    return f"{base.name}.{_PROVENANCE}" if base.is_file() else _PROVENANCE


def history(base: Path) -> list[dict[str, JSON]]:
    """What was merged into a base before, the first first; from the file that says so.

    Raises:
        IntegrityError: it cannot be read.
    """
    path = _folder(base) / provenance_name(base)
    try:
        said: Any = strict_json.read(path.read_bytes(), limit=_LIMIT)
    except FileNotFoundError:
        return []
    except (OSError, strict_json.NotStrict) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", "remove it if it is not of use to you") from None
    if not isinstance(said, dict) or not isinstance(said.get("adapters"), list):
        raise IntegrityError(f"{path} does not say what was merged", "remove it if it is not of use to you")
    earlier = said.pop("earlier", [])
    return [*(earlier if isinstance(earlier, list) else []), said]


def demand_new(base: Path, adapters: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Return where none of the adapters is in the base already, or that is allowed.

    Args:
        base: its folder or file.
        adapters: name -> sha256 of its weights file.
        allowed: finding codes.

    Raises:
        Degraded: naming those that are.
    """
    known = {each.get("sha256") for said in history(base) for each in said["adapters"] if isinstance(each, dict)}  # type: ignore[union-attr]  # a list: looked at where it was read
    twice = tuple(name for name, sha256 in adapters.items() if sha256 in known)
    if not twice or MERGED in allowed:
        return
    finding = Finding(
        code=MERGED,
        axis="base",
        level=Verdict.DEGRADED,
        message=f"{', '.join(twice)} was merged into {base} before, as {provenance_name(base)} says",
        where=twice,
        remedy="nothing is to be done; or merge into a fresh copy of the base",
        allowable=True,
    )
    raise Degraded(finding.message, f"to merge once more all the same: --allow {MERGED}", (finding,))


def _place(base: Source) -> Path:
    ref = as_ref(base) if not isinstance(base, Ref) else base
    if ref.path is None:
        raise UsageError(
            f"{os.fspath(base) if not isinstance(base, Ref) else base} lies in a hub's cache, which is never changed",
            "merge to a new folder with -o, or copy the base first and name that folder",
        )
    return Path(ref.path).expanduser()


def _folder(place: Path) -> Path:
    return place if place.is_dir() else place.parent
