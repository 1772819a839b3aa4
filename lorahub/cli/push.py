"""``lorahub push``."""

from __future__ import annotations

import shlex

import click

from lorahub import publishing
from lorahub.cli.options import base_option, hub_option, output_options
from lorahub.cli.output import Output, aligned, size
from lorahub.names import Ref

__all__ = ["push"]


@click.command()
@click.argument("ref", metavar="NS/NAME")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--version", metavar="VERSION", help="Publish as this immutable version, as 1.2.0.")
@click.option("--message", "-m", default="", help="Commit message.")
@base_option
@click.option("--license", "license_", metavar="SPDX", help="Licence of the adapter, as apache-2.0.")
@click.option("--private", is_flag=True, help="Make the repository private, where there is none yet.")
@click.option("--create-pr", is_flag=True, help="Propose the commit as a pull request; tags nothing.")
@click.option("--move-tag", is_flag=True, help="Let an existing version mean the new content.")
@click.option("--no-card", is_flag=True, help="Leave README.md as it is.")
@click.option("--dry-run", is_flag=True, help="Show what would be published; write nothing.")
@hub_option
@output_options
def push(
    ref: str,
    folder: str,
    version: str | None,
    message: str,
    base: str | None,
    license_: str | None,
    private: bool,
    create_pr: bool,
    move_tag: bool,
    no_card: bool,
    dry_run: bool,
    hub: str | None,
    out: Output,
) -> None:
    """Publish an adapter FOLDER as NS/NAME, as one commit and one immutable version tag.

    The folder is looked at first: links, secrets, unknown files and weights that are not finite are refused, trainer
    leftovers are skipped and listed. A folder as a trainer left it will do: lorahub.json is made from what it says, and
    so is a model card in README.md, whose other text stays. The same command again goes on where it was interrupted,
    and publishes nothing twice.
    """
    with out.progress(f"pushing {ref}") as progress:
        pushed = publishing.push(
            folder,
            ref,
            version=version,
            message=message,
            base=base,
            license=license_,
            private=private,
            create_pr=create_pr,
            move_tag=move_tag,
            dry_run=dry_run,
            card=not no_card,
            hub=hub,
            progress=progress,
        )
    pin = pushed.pin
    for name in pushed.skipped:
        out.say(f"skipped: {name}")
    for name in pushed.others:
        out.say(f"with it: {name}")
    out.findings(pushed.said)
    for name in pushed.written:
        out.say(f"{'would be written' if dry_run else 'written'}: {folder}/{name}")
    rows = [(path, size(file.size), (file.sha256 or file.git or "")[:12]) for path, file in pin.files.items()]
    lines = [f"{pin.repo}: {pin.why}", *([pushed.url] if pushed.url and not dry_run else []), aligned(rows)]
    proposed = pin.branch is not None and pin.branch.startswith("refs/pr/")
    named = pin.branch if proposed else pin.version or (pin.branch if pin.branch != "main" else None)
    pull = f"lorahub pull {Ref(repo=pin.repo, selector=named, subpath=pin.subfolder)}"
    out.answer(
        {
            "pin": pin.document(),
            "url": pushed.url,
            "pull": pull,
            "others": list(pushed.others),
            "written": list(pushed.written),
            "skipped": list(pushed.skipped),
            "findings": [finding.document() for finding in pushed.said],
            "dry_run": dry_run,
        },
        text="\n".join(lines),
        bare=pin.why if dry_run else pin.commit,
    )
    if dry_run:
        return
    if proposed and pin.branch is not None:
        number = pin.branch.rpartition("/")[2]
        out.say(f"to merge it: hf discussions merge {pin.repo} {number}")
        out.say(f"then, to tag it: lorahub push {ref} {folder} --version {pushed.record.version}")
    out.say(f"to fetch it: {pull}")
    known = pushed.record.base
    if known is not None and known.repo_id and not known.weights_digest:
        to = shlex.quote(folder)
        out.say("only its base's name is recorded, so every check against it says unverified; for the next version:")
        out.say(f"  lorahub record {to} --base {known.repo_id}")
