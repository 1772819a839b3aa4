"""``lorahub lock``."""

from __future__ import annotations

import click

from lorahub.cli.locking import manifest_option, offline_option, show_locked
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output
from lorahub.manifest import locking

__all__ = ["lock"]

_ALL = "*"


@click.command()
@click.option(
    "--upgrade",
    metavar="[NAME]",
    is_flag=False,
    flag_value=_ALL,
    multiple=True,
    help="Take what is newest within the manifest's ranges: of all, or of NAME; may be repeated.",
)
@click.option("--check", is_flag=True, help="Write nothing, ask nobody; exit 3 where manifest and lock disagree.")
@manifest_option
@offline_option
@hub_option
@output_options
def lock(
    upgrade: tuple[str, ...], check: bool, manifest: str | None, offline: bool, hub: str | None, out: Output
) -> None:
    """Resolve lorahub.toml and write lorahub.lock: commits, sha256 of every file, verdicts against the base.

    What is locked and still fits stays as it is; a newer version is taken only with --upgrade. The same inputs give the
    same bytes on every machine. No weights are downloaded.
    """
    with out.progress("resolving") as progress:
        locked = locking.lock(
            upgrade=True if _ALL in upgrade else upgrade,
            check=check,
            manifest=manifest,
            hub=hub,
            local_files_only=offline,
            progress=progress,
        )
    show_locked(out, locked)
