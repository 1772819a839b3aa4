"""``lorahub record``."""

from __future__ import annotations

import click

from lorahub import publishing
from lorahub.cli.options import base_option, compat_option, hub_option, output_options
from lorahub.cli.output import Output, aligned

__all__ = ["record"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@base_option
@click.option("--base-repo", metavar="NS/NAME", help="What a local base is called on the Hub; alone: one that is gone.")
@click.option("--base-revision", metavar="COMMIT", help="Its commit there, 40 hex digits.")
@click.option("--name", help="The adapter's name.")
@click.option("--license", "license_", metavar="SPDX", help="Licence of the adapter, as apache-2.0.")
@click.option("--description", help="One sentence on what it does.")
@click.option("--author", "authors", multiple=True, help="An author; may be repeated.")
@click.option("--trigger-word", "trigger_words", multiple=True, help="A word that calls the adapter; may be repeated.")
@compat_option
@hub_option
@output_options
def record(
    folder: str,
    base: str | None,
    base_repo: str | None,
    base_revision: str | None,
    name: str | None,
    license_: str | None,
    description: str | None,
    authors: tuple[str, ...],
    trigger_words: tuple[str, ...],
    compat: str | None,
    hub: str | None,
    out: Output,
) -> None:
    """Write lorahub.json into an adapter FOLDER: its base, its arithmetic, the digests of its files.

    Do this where the adapter is trained, while the base is at hand. A record that exists is brought up to date: what is
    not given stays as it is.
    """
    fields = {
        "name": name,
        "license": license_,
        "description": description,
        "authors": list(authors) or None,
        "trigger_words": list(trigger_words) or None,
    }
    with out.progress("hashing") as progress:
        written = publishing.record(
            folder,
            base,
            base_repo=base_repo,
            base_revision=base_revision,
            compat=compat,
            hub=hub,
            progress=progress,
            **{key: value for key, value in fields.items() if value is not None},
        )
    known = written.base
    facts = [
        ("kinds", ", ".join(written.kinds)),
        ("modules", str(len(written.modules))),
        ("base", (known.repo_id if known else "") or "without a name on the Hub"),
        ("revision", (known.revision if known else "") or "not recorded"),
        ("weights", (known.weights_digest if known else "") or "not recorded"),
        ("structure", (known.structure if known else "") or "not recorded"),
    ]
    out.answer(written.document(), text=f"{folder}/lorahub.json\n{aligned(facts)}", bare=f"{folder}/lorahub.json")
    missing = written.missing_for_push()
    if missing:
        out.say(f"before it can be pushed, the record needs: {', '.join(missing)}")
