"""``lorahub merge``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import click

from lorahub import patching
from lorahub.cli.options import allow_option, base_option, compat_option, hub_option, output_options
from lorahub.cli.output import Output, Progress, aligned, size
from lorahub.engine.folding.retention import Retention
from lorahub.engine.planning.casting import DTYPES
from lorahub.engine.rounding.table import MODES, STOCHASTIC
from lorahub.engine.writing.ranks import Ranks
from lorahub.engine.writing.where import folded_on
from lorahub.errors import UsageError
from lorahub.fetching import quiet
from lorahub.merging.apart import Weight
from lorahub.merging.preparing import named_weights, prepare

__all__ = ["merge"]


@click.command()
@click.argument("refs", metavar="REF[:WEIGHT]...", nargs=-1)
@base_option
@click.option(
    "-o",
    "--out",
    "target",
    metavar="FOLDER",
    help="Where the merged checkpoint goes; must not exist yet. X.safetensors for one file.",
)
@click.option(
    "--weight",
    "parts",
    multiple=True,
    metavar="[ADAPTER:]COMPONENT=NUMBER",
    help="Of a pipeline: weigh one component apart, times the adapter's own weight. unet=0.8; ink:text_encoder=0.",
)
@click.option("--in-place", is_flag=True, help="Write to the base's own files, only what changes.")
@click.option("--keep-undo", is_flag=True, help="With --in-place: keep the old bytes there, for --undo.")
@click.option("--undo", metavar="FOLDER", help="Take back the last merge in place that kept its old bytes, and stop.")
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be done and stop.")
@click.option(
    "--tokenizer",
    type=click.Choice(["adapter", "base"]),
    default="adapter",
    show_default=True,
    help="Whose tokenizer, processor and chat template files come along where both have them.",
)
@click.option("--threads", type=click.IntRange(min=1), help="How many threads fold; the result does not depend on it.")
@click.option("--device", metavar="DEVICE", help="Where units are folded: cpu (the default), cuda, cuda:1.")
@click.option(
    "--mode",
    default="fast",
    show_default=True,
    metavar="MODE",
    help=f"How sums are rounded: {', '.join(name for name in MODES if '(' not in name)} or {STOCHASTIC}.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="What the result is stored in, all of it.")
@allow_option
@compat_option
@hub_option
@output_options
def merge(
    refs: tuple[str, ...],
    base: str | None,
    target: str | None,
    parts: tuple[str, ...],
    in_place: bool,
    keep_undo: bool,
    undo: str | None,
    plan_only: bool,
    tokenizer: str,
    threads: int | None,
    device: str | None,
    allow: tuple[str, ...],
    compat: str | None,
    mode: str,
    dtype: str | None,
    hub: str | None,
    out: Output,
) -> None:
    """Merge one or more adapters into a base and write a new checkpoint, shard by shard.

    Weights go behind a colon: acme/ink@1.2:0.8 acme/sql:0.5; --weight unet=0.8 weighs one component of a pipeline. A
    run that was killed goes on with the shards that are missing when the same command is given again; one in place is
    completed, or has changed nothing. Under torchrun (torchrun --nproc-per-node 4 -m lorahub merge ...) every process
    makes a part of the shards.
    """
    if undo is not None:
        if refs or base or target or in_place:
            raise UsageError("--undo takes the folder and nothing else", f"lorahub merge --undo {undo}")
        report = patching.undo(undo)
        out.answer(
            {"undone": undo, "parameters": sorted(report.changes)},
            text=f"{undo}\n{aligned([('parameters as before', str(report.changed))])}",
            bare=undo,
        )
        return
    if not refs:
        raise UsageError(
            "no adapter was given, so there is nothing to merge", "lorahub merge REF --base BASE -o FOLDER"
        )
    if not plan_only and bool(target) == in_place:
        raise UsageError(
            "merge needs one of -o FOLDER and --in-place, or --plan to only look",
            f"lorahub merge {' '.join(refs)} --plan",
        )
    if in_place and not base:
        raise UsageError("--in-place needs the folder that is to change", "lorahub merge REF --base FOLDER --in-place")
    settled = patching.settle_base(base) if in_place and base and not plan_only else None
    ranks, where = Ranks.from_environment(), folded_on(device)
    with _progress(out, "reading", ranks) as progress:
        job = prepare(
            base,
            refs,
            weights=_apart(refs, parts) if parts else None,
            allow=allow,
            compat=compat,
            mode=mode,
            dtype=dtype,
            hub=hub,
            whole=not plan_only,
            progress=progress,
        )
    if plan_only:
        out.answer(job.document(), text=f"{job.plan.explain()}\n\nverdict: {job.verdict}", bare=job.plan.digest())
        out.findings([finding for finding in job.findings if finding not in job.plan.findings])  # the others are in it
        job.refuse()
        return
    keep_base = tokenizer == "base"
    if in_place:
        with out.progress("merging") as progress:
            report = job.write_in_place(
                keep_undo=keep_undo,
                keep_base_tokenizer=keep_base,
                settled=settled,
                threads=threads,
                where=where,
                progress=progress,
            )
        out.findings(job.findings, allowed=allow)
    else:
        job.refuse()
        if not ranks.rank:
            out.findings(job.findings, allowed=allow)
        assert target is not None
        with _progress(out, "pulling", ranks) as progress:
            job = job.pulled(progress)
        with _progress(out, "merging", ranks) as progress:
            report = job.write(
                target, keep_base_tokenizer=keep_base, threads=threads, where=where, ranks=ranks, progress=progress
            )
    if ranks.rank:
        return  # rank 0 tells the whole
    out.findings(report.findings, allowed=allow)
    facts = [
        ("parameters changed", str(report.changed)),
        (
            "largest relative change",
            f"{report.largest_change:.3g}" + (f" ({report.largest_name})" if report.largest_name else ""),
        ),
        *([("kept of the change as stored", _kept(report.retention))] if report.retention else []),
        ("read / written", f"{size(report.bytes_read)} / {size(report.bytes_written)}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    place = str(target or base)
    out.answer(report.document(), text=f"{place}\n{aligned(facts)}", bare=place)


def _apart(refs: tuple[str, ...], parts: tuple[str, ...]) -> dict[str, Weight]:
    """The weights of all adapters, those of some by component.

    Raises:
        UsageError: a part cannot be read, is said twice, or does not say of which adapter it is.
    """
    weights = {name: weight for name, (_, weight) in named_weights(refs).items()}
    found: dict[str, dict[str, float]] = {}
    for part in parts:
        place, sign, text = part.rpartition("=")
        name, _, component = place.rpartition(":")
        if not sign or not component:
            raise UsageError(f"--weight {part} is no COMPONENT=NUMBER", "--weight unet=0.8 --weight text_encoder=0.3")
        if not name and len(weights) > 1:
            raise UsageError(f"--weight {part} does not say of which adapter", f"--weight {next(iter(weights))}:{part}")
        name = name or next(iter(weights))
        if name not in weights:
            raise UsageError(f"no adapter is called '{name}'", f"the adapters are {', '.join(weights)}")
        if component in found.get(name, {}):
            raise UsageError(f"{component} of '{name}' has two weights", "give it one")
        try:
            number = float(text)
        except ValueError:
            raise UsageError(f"--weight {part}: {text!r} is no number", f"--weight {place}=0.8") from None
        found.setdefault(name, {})[component] = weights[name] * number
    return {name: {**found[name], "default": weight} if name in found else weight for name, weight in weights.items()}


def _kept(retention: Retention) -> str:
    return f"{retention.gain:.1%}"


def _progress(out: Output, what: str, ranks: Ranks) -> AbstractContextManager[Progress]:
    """A bar, of rank 0 alone."""
    return nullcontext(quiet) if ranks.rank else out.progress(what)
