"""``lorahub card``."""

from __future__ import annotations

import click

from lorahub import carding
from lorahub.cards import FILE
from lorahub.cli.options import output_options
from lorahub.cli.output import Output

__all__ = ["card"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--repo", metavar="NS/NAME[/FOLDER]", help="Where it will be on the hub; the record's name by default.")
@click.option("--write", is_flag=True, help="Write README.md and its picture into the folder.")
@output_options
def card(folder: str, repo: str | None, write: bool, out: Output) -> None:
    """Show the model card of an adapter FOLDER, as a push would write it.

    What stands in README.md is kept, metadata included; lorahub's part lies between two comments and is brought up to
    date in its place.
    """
    made = carding.card(folder, repo, write=write)
    files = [f"{folder}/{name}" for name in (FILE, *made.pictures)]
    document = {
        "folder": folder,
        "text": made.text,
        "pictures": {name: len(content) for name, content in made.pictures.items()},
        "written": files if write else [],
        "findings": [finding.document() for finding in made.findings],
    }
    out.answer(
        document, text="\n".join(files) if write else made.text.rstrip("\n"), bare=files[0] if write else made.text
    )
    out.findings(made.findings)
