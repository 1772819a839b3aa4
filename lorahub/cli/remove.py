"""``lorahub remove``."""

from __future__ import annotations

import click

from lorahub.cli.locking import manifest_option, offline_option, show_locked
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output
from lorahub.manifest import adding

__all__ = ["remove"]


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--no-lock", is_flag=True, help="Leave the lock as it is.")
@manifest_option
@offline_option
@hub_option
@output_options
def remove(
    names: tuple[str, ...], no_lock: bool, manifest: str | None, offline: bool, hub: str | None, out: Output
) -> None:
    """Take adapters out of lorahub.toml and its lock; their folders go with the next sync."""
    with out.progress("resolving") as progress:
        locked = adding.remove(
            *names, no_lock=no_lock, manifest=manifest, hub=hub, local_files_only=offline, progress=progress
        )
    if no_lock:
        out.answer({"manifest": str(locked.path.with_suffix(".toml"))}, text="", bare=None)
        out.say("removed, and not locked: lorahub lock")
        return
    show_locked(out, locked)
