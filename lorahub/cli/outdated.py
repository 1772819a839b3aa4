"""``lorahub outdated``."""

from __future__ import annotations

import click

from lorahub.cli.locking import manifest_option, offline_option
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned
from lorahub.errors import Unavailable
from lorahub.manifest import watching

__all__ = ["outdated"]


@click.command()
@manifest_option
@offline_option
@hub_option
@output_options
def outdated(manifest: str | None, offline: bool, hub: str | None, out: Output) -> int:
    """Say how everything that is locked stands on its hub now; changes nothing.

    States: current, newer-in-range (lock --upgrade takes it), newer-outside, tag-moved, commit-gone, renamed,
    superseded, gated, disabled, private-or-gone, local, unknown. Exit 6 only where nothing could be asked.
    """
    with out.progress("asking", unit="steps") as progress:
        found = watching.outdated(manifest=manifest, hub=hub, local_files_only=offline, progress=progress)
    head = ("NAME", "LOCKED", "NEWEST", "STATE")
    rows = [(each.name, each.locked, each.newest or "-", ", ".join(each.states)) for each in found.rows]
    odd = [each.name for each in found.rows if each.states[0] not in {"current", "local"}]
    out.answer(found.document(), text=aligned([head, *rows], indent="") if rows else "", bare="\n".join(odd) or None)
    for each in found.rows:
        for note in each.notes:
            out.say(f"{each.name}: {note}")
    if any("newer-in-range" in each.states for each in found.rows):
        out.say("To take what is newer within the ranges: lorahub lock --upgrade, then lorahub sync")
    return 0 if found.checked else Unavailable.exit_code
