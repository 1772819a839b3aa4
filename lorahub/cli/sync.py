"""``lorahub sync``."""

from __future__ import annotations

import click

from lorahub.cli.locking import changes_text, manifest_option, offline_option
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned
from lorahub.cli.pull import notes
from lorahub.manifest import syncing

__all__ = ["sync"]


@click.command()
@click.option("--dest", metavar="DIR", help="Where to; the folder adapters beside the manifest by default.")
@click.option("--locked", is_flag=True, help="Exit 3 where manifest and lock disagree, instead of locking.")
@click.option("--frozen", is_flag=True, help="Take the lock as it is, whatever the manifest says now.")
@manifest_option
@offline_option
@hub_option
@output_options
def sync(
    dest: str | None, locked: bool, frozen: bool, manifest: str | None, offline: bool, hub: str | None, out: Output
) -> None:
    """Install exactly what is locked, one verified folder for each adapter; lock first where the manifest changed.

    \b
      lorahub sync --locked --dest /srv/adapters
      VLLM_PLUGINS=lora_filesystem_resolver VLLM_LORA_RESOLVER_CACHE_DIR=/srv/adapters vllm serve BASE --enable-lora

    A folder that is right stays as it is, and what is not from here is neither replaced nor removed. Where everything
    is in place or in the cache, nobody is asked. A run that was killed is finished by the next one.
    """  # noqa: D301 - click takes a backspace for "leave these lines as they are"
    with out.progress("syncing") as progress:
        synced = syncing.sync(
            dest=dest,
            locked=locked,
            frozen=frozen,
            manifest=manifest,
            hub=hub,
            local_files_only=offline,
            progress=progress,
        )
    if synced.changes:
        out.say("locked first, since the manifest changed:")
        out.say(changes_text(synced.changes))
    notes(out, synced.findings)
    counts = {what: list(synced.done.values()).count(what) for what in ("installed", "replaced", "removed", "kept")}
    out.say(f"{synced.dest}: {', '.join(f'{number} {what}' for what, number in counts.items() if number) or 'empty'}")
    rows = [(name, str(folder)) for name, folder in synced.items()]
    out.answer(synced.document(), text=aligned(rows, indent=""), bare="\n".join(map(str, synced.values())))
