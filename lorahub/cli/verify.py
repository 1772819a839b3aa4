"""``lorahub verify``."""

from __future__ import annotations

import shlex

import click

from lorahub.cli.locking import manifest_option
from lorahub.cli.options import output_options
from lorahub.cli.output import Output, aligned
from lorahub.errors import IntegrityError
from lorahub.manifest import verifying

__all__ = ["verify"]


@click.command()
@click.option("--dest", metavar="DIR", help="Where they were installed; the folder adapters beside the manifest.")
@manifest_option
@output_options
def verify(dest: str | None, manifest: str | None, out: Output) -> int:
    """Hash every installed file and hold it against lorahub.lock: ok, changed, missing or extra.

    Exit 5 where a file is not as it was locked, or one lies there that would be loaded. Asks nobody.
    """
    with out.progress("hashing") as progress:
        found = verifying.verify(dest=dest, manifest=manifest, progress=progress)
    rows = [(each.state, f"{each.name}/{each.path}") for each in found.files]
    wrong = [path for each, (_, path) in zip(found.files, rows, strict=True) if not each.ok]
    out.answer(found.document(), text=aligned(rows, indent=""), bare="\n".join(wrong) or None)
    if found.ok:
        out.say(f"{len(found.files)} files are as they were locked")
        return 0
    out.say(f"{len(wrong)} of {len(found.files)} files are not as they were locked")
    out.say(
        f"To install what is locked: move those folders away, then lorahub sync --dest {shlex.quote(str(found.dest))}"
    )
    return IntegrityError.exit_code
