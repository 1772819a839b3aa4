"""``lorahub merge``."""

from __future__ import annotations

import click

from lorahub import merging
from lorahub.cli.options import allow_option, base_option, compat_option, hub_option, output_options
from lorahub.cli.output import Output, aligned, size
from lorahub.errors import UsageError

__all__ = ["merge"]


@click.command()
@click.argument("refs", metavar="REF[:WEIGHT]...", nargs=-1, required=True)
@base_option
@click.option("-o", "--out", "target", metavar="FOLDER", help="Where the merged checkpoint goes; must not exist yet.")
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be done and stop.")
@click.option(
    "--tokenizer",
    type=click.Choice(["adapter", "base"]),
    default="adapter",
    show_default=True,
    help="Whose tokenizer, processor and chat template files come along where both have them.",
)
@click.option("--threads", type=click.IntRange(min=1), help="How many threads fold; the result does not depend on it.")
@allow_option
@compat_option
@hub_option
@output_options
def merge(
    refs: tuple[str, ...],
    base: str | None,
    target: str | None,
    plan_only: bool,
    tokenizer: str,
    threads: int | None,
    allow: tuple[str, ...],
    compat: str | None,
    hub: str | None,
    out: Output,
) -> None:
    """Merge one or more adapters into a base and write a new checkpoint, shard by shard.

    Weights go behind a colon: acme/ink@1.2:0.8 acme/sql:0.5. A run that was killed goes on with the shards that
    are missing when the same command is given again.
    """
    if not plan_only and not target:
        raise UsageError("merge needs -o FOLDER, or --plan to only look", f"lorahub merge {' '.join(refs)} --plan")
    with out.progress("reading") as progress:
        job = merging.prepare(base, refs, allow=allow, compat=compat, hub=hub, progress=progress)
    if plan_only:
        out.answer(job.document(), text=f"{job.plan.explain()}\n\nverdict: {job.verdict}", bare=job.plan.digest())
        out.findings([finding for finding in job.findings if finding not in job.plan.findings])  # the others are in it
        job.refuse()
        return
    job.refuse()
    out.findings(job.findings, allowed=allow)
    assert target is not None
    with out.progress("merging") as progress:
        report = job.write(target, keep_base_tokenizer=tokenizer == "base", threads=threads, progress=progress)
    facts = [
        ("parameters changed", str(report.changed)),
        (
            "largest relative change",
            f"{report.largest_change:.3g}" + (f" ({report.largest_name})" if report.largest_name else ""),
        ),
        ("read / written", f"{size(report.bytes_read)} / {size(report.bytes_written)}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    out.answer(report.document(), text=f"{target}\n{aligned(facts)}", bare=target)
