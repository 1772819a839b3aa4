"""``lorahub versions``."""

from __future__ import annotations

import click

from lorahub import searching
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned
from lorahub.cli.pull import notes
from lorahub.names import printable

__all__ = ["versions"]


@click.command()
@click.argument("ref", metavar="NS/NAME")
@hub_option
@output_options
def versions(ref: str, hub: str | None, out: Output) -> None:
    """List the versions of an adapter, newest first, with their tags and commits.

    The document of --json has the keys repo, versions (a list of version, tag, commit), branches (name to commit),
    private, gated, disabled, successor, license and findings. -q prints the versions alone.
    """
    found = searching.versions(ref, hub=hub)
    now = found.standing
    rows = [("VERSION", "TAG", "COMMIT")]
    rows += [(str(each.version), printable(each.tag), each.commit) for each in found.versions]
    branches = ", ".join(f"{printable(name)} ({commit[:12]})" for name, commit in sorted(now.branches.items())[:5])
    out.answer(
        {
            "repo": now.repo,
            "versions": [
                {"version": str(each.version), "tag": each.tag, "commit": each.commit} for each in found.versions
            ],
            "branches": dict(sorted(now.branches.items())),
            "private": now.private,
            "gated": now.gated,
            "disabled": now.disabled,
            "successor": now.successor,
            "license": now.license,
            "findings": [each.document() for each in found.findings],
        },
        text=aligned(rows, indent="") if found.versions else "",
        bare="\n".join(str(each.version) for each in found.versions),
    )
    notes(out, found.findings)
    if not found.versions:
        out.say(f"{now.repo} has no versions yet; branches: {branches or 'none'}")
    states = [word for word in ("private", "gated", "disabled") if getattr(now, word)]
    if states:
        out.say(f"{now.repo} is {' and '.join(states)}")
