"""What the commands of a manifest share: its option, and how a lock's changes are told."""

from __future__ import annotations

from collections.abc import Sequence

import click

from lorahub.cli.output import Output, aligned
from lorahub.cli.pull import notes
from lorahub.manifest.changes import Change
from lorahub.manifest.locking import Locked

__all__ = ["changes_text", "manifest_option", "offline_option", "show_locked"]

manifest_option = click.option(
    "--manifest", metavar="FILE", help="The manifest; the nearest lorahub.toml from here upwards by default."
)
offline_option = click.option("--offline", is_flag=True, help="Use only what is already in the cache.")

_SIGNS = {"added": "+", "removed": "-", "updated": "~", "checked": "~"}


def changes_text(changes: Sequence[Change]) -> str:
    """A table of changes: sign, name, from, to."""
    rows = [
        (_SIGNS[each.what], each.name, " -> ".join(filter(None, [each.before, each.after])), each.why)
        for each in changes
    ]
    return aligned(rows, indent="")


def show_locked(out: Output, locked: Locked, *, document: dict[str, object] | None = None) -> None:
    """Tell what locking changed: the table is the answer, the lock's file the bare one."""
    notes(out, locked.findings)
    text = changes_text(locked.changes)
    out.answer({**(document or {}), **locked.document()}, text=text, bare=str(locked.path))
    if not locked.changes:
        count = len(locked.lock.adapter)
        same = f"the same {count} adapter{'s' * (count != 1)}" if count else "no adapters yet"
        out.say(f"{locked.path} is {'written' if locked.written else 'up to date'}: {same}")
