"""``lorahub tag``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import click

from lorahub import tagging
from lorahub.cli.options import output_options
from lorahub.cli.output import Output, aligned, brief
from lorahub.errors import UsageError

__all__ = ["tag"]

_SHORT = "\n".join(f"  {short:<16} {key}" for short, key in tagging.SHORT.items())


@click.command(
    help=f"""Write metadata into a safetensors FILE: trigger words, base, title, or any other KEY=VALUE.

Only the header changes: the tensors stay byte for byte as they are, and so does the hash that sites call AutoV3. The
file is replaced whole or not at all. Without KEY=VALUE its metadata are shown.

\b
  lorahub tag ink.safetensors trigger_words="ink wash, sumi" base=stabilityai/stable-diffusion-xl-base-1.0
  lorahub tag ink.safetensors modelspec.title="Ink wash" --remove ss_training_comment

Short keys, and what they are written as:

\b
{_SHORT}
"""
)
@click.argument("file", type=click.Path(exists=True))
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--remove", metavar="KEY", multiple=True, help="Take a key out; may be repeated.")
@click.option("--show", is_flag=True, help="Show all metadata afterwards.")
@output_options
def tag(file: str, pairs: tuple[str, ...], remove: tuple[str, ...], show: bool, out: Output) -> None:
    """See the help above, which lists the table of keys."""
    changes: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"'{pair}' is no KEY=VALUE", f"lorahub tag {file} {pair}=...")
        if changes.get(key, value) != value:
            raise UsageError(f"two values are given for {key}", "give one of them")
        changes[key] = value
    if not changes and not remove:
        found = tagging.metadata_of(file)
        out.answer({"path": file, "metadata": found}, text=_table(found) or f"{file} has no metadata")
        return
    done = tagging.tag(file, changes, remove=remove)
    text = f"{done.path}: {', '.join(done.changed)}" if done.changed else f"{done.path}: nothing to change"
    out.answer(done.document(), text=f"{text}\n{_table(done.metadata)}" if show else text, bare=str(done.path))
    if done.record == "updated":
        out.say("lorahub.json beside it keeps the file's new digest")
    if done.record == "stale":
        out.say("lorahub.json beside it was stale before and is left as it was: lorahub record FOLDER")
    if done.lacking:
        out.say(f"ModelSpec also asks for {', '.join(done.lacking)}")


def _table(metadata: Mapping[str, str]) -> str:
    width = shutil.get_terminal_size((120, 24)).columns
    rows = [(brief(key, 40), value) for key, value in metadata.items()]
    room = max(width - max((len(key) for key, _ in rows), default=0) - 4, 20)
    return aligned([(key, brief(value, room)) for key, value in rows])
