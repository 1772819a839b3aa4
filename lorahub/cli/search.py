"""``lorahub search``."""

from __future__ import annotations

import shlex

import click

from lorahub import searching
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned, brief

__all__ = ["search"]

_SORTS = ("downloads", "likes", "updated", "created")
_HEAD = ("NAME", "VERSION", "BASE", "DOWNLOADS", "UPDATED", "LICENCE", "")


@click.command()
@click.argument("text", default="")
@click.option("--base", metavar="ORG/NAME", help="Adapters of this base.")
@click.option("--author", metavar="NAME", help="Of this user or organisation.")
@click.option("--library", metavar="NAME", help="For this library, as peft or diffusers.")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="With this tag; may be repeated.")
@click.option("--sort", type=click.Choice(_SORTS), default="downloads", show_default=True, help="Most or newest first.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many at most.")
@hub_option
@output_options
def search(
    text: str,
    base: str | None,
    author: str | None,
    library: str | None,
    tags: tuple[str, ...],
    sort: str,
    limit: int,
    hub: str | None,
    out: Output,
) -> None:
    """Find adapters by a part of their name, by base, author, library and tags, as their cards say it.

    Without --base, --library or --tag, Hugging Face is asked for what is tagged lora. The document of --json is a list
    of objects with the keys repo, version, base, downloads, likes, updated, library, license, tags and gated; what the
    hub does not say is null or empty. -q prints the names alone.
    """
    found = searching.search(
        text, base=base, author=author, library=library, tags=tags, sort=sort, limit=limit, hub=hub
    )
    rows = [_HEAD] + [
        (
            each.repo,
            each.version or "-",
            brief(each.base or "-", 60),
            "-" if each.downloads is None else f"{each.downloads:,}",
            each.updated or "-",
            brief(each.license or "-", 20),
            "gated" if each.gated else "",
        )
        for each in found
    ]
    out.answer(
        [
            {
                "repo": each.repo,
                "version": each.version,
                "base": each.base,
                "downloads": each.downloads,
                "likes": each.likes,
                "updated": each.updated,
                "library": each.library,
                "license": each.license,
                "tags": list(each.tags),
                "gated": each.gated,
            }
            for each in found
        ],
        text=aligned(rows, indent="") if found else "",
        bare="\n".join(each.repo for each in found),
    )
    if not found:
        out.say("nothing found")
        for line in _else(base, author, library, tags, text):
            out.say(f"  {line}")
    elif len(found) == limit:
        out.say(f"the first {limit}; more with --limit")


def _else(base: str | None, author: str | None, library: str | None, tags: tuple[str, ...], text: str) -> list[str]:
    """What to try where nothing was found."""
    advice = []
    if base is not None:
        name = base.partition("@")[0].rpartition("/")[2]
        advice.append(f"adapters whose cards do not name the base: lorahub search {shlex.quote(name)}")
    if not (base or library or tags):
        given = [*([text] if text else []), *(["--author", author] if author else []), "--library", "peft"]
        advice.append(f"adapters that are not tagged lora: lorahub search {shlex.join(given)}")
    if sum(map(bool, (base, author, library, tags, text))) > 1:
        advice.append("all that is given must hold at once: leave something out")
    return advice or ["look at the spelling, or leave something out"]
