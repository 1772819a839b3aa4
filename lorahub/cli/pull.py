"""``lorahub pull``."""

from __future__ import annotations

import click

from lorahub import fetching
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output

__all__ = ["pull"]


@click.command()
@click.argument("ref")
@hub_option
@click.option("--offline", is_flag=True, help="Use only what is already in the cache.")
@output_options
def pull(ref: str, hub: str | None, offline: bool, out: Output) -> None:
    """Fetch an adapter by version, verify every file, and print the folder it lies in.

    REF is NS/NAME[@SELECTOR]: a version (1.2.3), a series (1.2), a range (~=1.2), a tag, a branch or a commit. Without
    a selector the highest stable version is taken.
    """
    with out.progress(f"pulling {ref}") as progress:
        pulled = fetching.pull(ref, hub=hub, local_files_only=offline, progress=progress)
    out.say(
        f"{pulled.pin.repo}: {pulled.pin.why}, commit {pulled.pin.commit[:12]}, {len(pulled.pin.files)} files verified"
    )
    out.answer(
        {"folder": str(pulled.folder), "pin": pulled.pin.document()}, text=str(pulled.folder), bare=str(pulled.folder)
    )
