"""``lorahub pull``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorahub import fetching
from lorahub.cli.options import allow_option, hub_option, output_options
from lorahub.cli.output import Output, aligned, size
from lorahub.findings import Finding, Verdict

if TYPE_CHECKING:
    from lorahub.hub.hub import Pin

__all__ = ["notes", "pull"]


@click.command()
@click.argument("ref")
@hub_option
@click.option("--offline", is_flag=True, help="Use only what is already in the cache.")
@click.option("--dest", metavar="DIR", type=click.Path(path_type=Path), help="Also put a verified copy here.")
@click.option("--dry-run", is_flag=True, help="Show what would be fetched, with sizes; fetch nothing.")
@allow_option
@output_options
def pull(
    ref: str,
    hub: str | None,
    offline: bool,
    dest: Path | None,
    dry_run: bool,
    allow: tuple[str, ...],
    out: Output,
) -> None:
    """Fetch an adapter by version, verify every file, and print the folder it lies in.

    REF is NS/NAME[@SELECTOR]: a version (1.2.3), a series (1.2), a range (~=1.2), a tag, a branch or a commit. Without
    a selector the highest stable version is taken. A version tag that is another commit than when this machine first
    saw it is refused; --allow tag-moved accepts it from then on. Private and gated repositories take the token of
    "hf auth login" or HF_TOKEN.
    """
    if dry_run:
        pin = fetching.resolve(ref, hub=hub, local_files_only=offline, allow=allow)
        notes(out, pin.said, allow)
        rows = [(path, size(file.size)) for path, file in pin.files.items()]
        text = "\n".join([f"{_what(pin)}, {len(pin.files)} files, {size(pin.size)}", aligned(rows)])
        document = {"pin": pin.document(), "bytes": pin.size, "findings": [each.document() for each in pin.said]}
        out.answer(document, text=text, bare=pin.commit)
        return
    with out.progress(f"pulling {ref}") as progress:
        pulled = fetching.pull(ref, hub=hub, local_files_only=offline, dest=dest, allow=allow, progress=progress)
    notes(out, pulled.findings, allow)
    out.say(f"{_what(pulled.pin)}, {len(pulled.pin.files)} files verified")
    out.answer(
        {
            "folder": str(pulled.folder),
            "pin": pulled.pin.document(),
            "findings": [each.document() for each in pulled.findings],
        },
        text=str(pulled.folder),
        bare=str(pulled.folder),
    )


def notes(out: Output, found: Collection[Finding], allowed: Collection[str] = ()) -> None:
    """Say what a hub let on, the mere notes too: nobody asked for them, and somebody should know."""
    out.findings(tuple(found), allowed=allowed)
    for finding in found:
        if finding.level < Verdict.UNVERIFIED:
            out.say(f"note: {finding.show()}")
            out.say(f"  {finding.remedy}")


def _what(pin: Pin) -> str:
    return f"{pin.repo}: {pin.why}{f' ({pin.tag})' if pin.tag else ''}, commit {pin.commit[:12]}"
