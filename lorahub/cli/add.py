"""``lorahub add``."""

from __future__ import annotations

import click

from lorahub.cli.locking import manifest_option, offline_option, show_locked
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output
from lorahub.manifest import adding

__all__ = ["add"]


@click.command()
@click.argument("refs", metavar="REF...", nargs=-1)
@click.option("--name", metavar="NAME", help="What the adapter is called here; the last part of REF by default.")
@click.option("--base", metavar="BASE", help="Set the base: ORG/NAME[@REVISION], or a folder of the project.")
@click.option(
    "--verdict",
    type=click.Choice(("exact", "compatible", "unverified")),
    help="The worst verdict against the base to accept from now on; compatible where the manifest says none.",
)
@click.option("--no-lock", is_flag=True, help="Only write it down, as it is given.")
@manifest_option
@offline_option
@hub_option
@output_options
def add(
    refs: tuple[str, ...],
    name: str | None,
    base: str | None,
    verdict: str | None,
    no_lock: bool,
    manifest: str | None,
    offline: bool,
    hub: str | None,
    out: Output,
) -> None:
    """Write adapters into lorahub.toml, which is made where there is none, and lock them.

    \b
      lorahub add --base acme/base
      lorahub add acme/ink                  # newest version, and what is compatible: @~=1.2
      lorahub add sql=acme/sql@1.0:0.5 ./own
      lorahub add --verdict unverified      # accept adapters whose base nobody recorded

    What the policy refuses changes nothing. Comments and order in the file stay as they are. No weights are downloaded.
    """  # noqa: D301 - click takes a backspace for "leave these lines as they are"
    with out.progress("resolving") as progress:
        locked = adding.add(
            *refs,
            base=base,
            name=name,
            verdict=verdict,
            no_lock=no_lock,
            manifest=manifest,
            hub=hub,
            local_files_only=offline,
            progress=progress,
        )
    if no_lock:
        out.answer({"manifest": str(locked.path.with_suffix(".toml"))}, text="", bare=None)
        out.say("written, and not locked: lorahub lock")
        return
    show_locked(out, locked)
