"""``lorahub push``."""

from __future__ import annotations

import click

from lorahub import publishing
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned, size

__all__ = ["push"]


@click.command()
@click.argument("ref", metavar="NS/NAME")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--version", metavar="VERSION", help="Publish as this immutable version, as 1.2.0.")
@click.option("--message", "-m", default="", help="Commit message.")
@click.option("--dry-run", is_flag=True, help="Show what would be published; write nothing.")
@hub_option
@output_options
def push(ref: str, folder: str, version: str | None, message: str, dry_run: bool, hub: str | None, out: Output) -> None:
    """Publish an adapter FOLDER as NS/NAME, as one commit and one immutable version tag.

    The folder is surveyed first: links, secrets and unknown files are refused, trainer leftovers are skipped and
    listed. The version is written into the folder's lorahub.json.
    """
    with out.progress(f"pushing {ref}") as progress:
        pushed = publishing.push(
            folder, ref, version=version, message=message, dry_run=dry_run, hub=hub, progress=progress
        )
    for name in pushed.skipped:
        out.say(f"skipped: {name}")
    rows = [(path, size(pin.size), (pin.sha256 or "")[:12]) for path, pin in sorted(pushed.pin.files.items())]
    head = f"{pushed.pin.repo}{f'@{version}' if version else ''}: {pushed.pin.why}"
    out.answer(
        {"pin": pushed.pin.document(), "skipped": list(pushed.skipped), "dry_run": dry_run},
        text=f"{head}\n{aligned(rows)}",
        bare=pushed.pin.commit,
    )
