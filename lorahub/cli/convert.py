"""``lorahub convert``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import click

from lorahub import converting
from lorahub.cli.options import allow_option, base_option, compat_option, hub_option, output_options
from lorahub.cli.output import Output, aligned
from lorahub.conversion.report import ConversionReport, Converted

__all__ = ["convert"]


@click.command()
@click.argument("source")
@click.option("--to", "to", metavar="FORMAT", required=True, help="The layout: peft, diffusers, kohya, mlx, ...")
@click.option(
    "-o",
    "--out",
    "target",
    metavar="PATH",
    required=True,
    help="A new folder, or a new file (x.safetensors) where the layout is a single file.",
)
@base_option
@click.option("--component", default="", metavar="NAME", help="Part of a pipeline to keep, or to write for: unet, ...")
@click.option(
    "--kind", type=click.Choice(["lora"]), help="Rewrite all that is LoRA in another dress (LoHa, LoKr, ...) as LoRA."
)
@click.option("--approximate", is_flag=True, help="Let changes of full rank become LoRA of a lower one.")
@click.option("--rank", type=click.IntRange(min=1), help="With --approximate: at most this rank.")
@click.option("--energy", type=float, help="With --approximate: keep this share of the squared norm, as 0.99.")
@click.option("--error", type=float, help="With --approximate: lose at most this share of the norm, as 0.05.")
@click.option(
    "--verify/--no-verify", default=None, help="Compare every target's change. By default where that is cheap."
)
@click.option("--dtype", default="", metavar="DTYPE", help=f"Store as {', '.join(converting.DTYPES)}.")
@compat_option
@allow_option
@hub_option
@output_options
def convert(
    source: str,
    to: str,
    target: str,
    base: str | None,
    component: str,
    kind: str | None,
    approximate: bool,
    rank: int | None,
    energy: float | None,
    error: float | None,
    verify: bool | None,
    dtype: str,
    compat: str | None,
    allow: tuple[str, ...],
    hub: str | None,
    out: Output,
) -> None:
    """Write an adapter in another layout.

    SOURCE is a folder, a file, or NS/NAME[@VERSION]. What was only renamed is the same bits; everything else is held
    against the source's own change. What the layout has no word for is refused by name, unless --allow cannot-carry
    leaves it out, which is written down.
    """
    with out.progress("converting", unit="steps") as progress:
        report = converting.convert(
            source,
            to,
            target,
            base=base,
            component=component,
            kind="lora" if kind else "",
            approximate=approximate,
            rank=rank,
            energy=energy,
            error=error,
            verify=verify,
            dtype=dtype,
            compat=compat,
            allow=allow,
            hub=hub,
            progress=progress,
        )
    out.findings(report.findings, allowed=allow)
    out.answer(report.document(), text=_text(report, each=verify is True), bare=report.out)
    for loss in report.losses:
        out.say(f"not carried: {loss}")


def _text(report: ConversionReport, *, each: bool) -> str:
    facts = [
        ("layout", f"{report.before} -> {report.after}"),
        ("targets", str(len(report.targets))),
        ("difference", _difference(report)),
    ]
    if report.losses:
        facts.append(("not carried", f"{len(report.losses)}, listed below"))
    rows = _each(report.targets) if each else _grouped(report.targets)
    return f"{report.out}\n{aligned(facts)}\n\n{aligned(rows)}"


def _difference(report: ConversionReport) -> str:
    error = report.max_error
    if error is None:
        return "not compared: --verify"
    said = "none: the same bits" if not error else f"{error:.1e} of a change's norm at most"
    if not report.exact:
        said += ", as was asked for"
    return f"{said}; {report.unverified} targets were not compared: --verify" if report.unverified else said


def _grouped(targets: Sequence[Converted]) -> list[tuple[str, ...]]:
    """One line for targets that went the same way."""
    groups: dict[tuple[str, ...], list[Converted]] = defaultdict(list)
    for target in targets:
        key = (_ways(target), _arrow(target.before, target.after), _arrow(target.rank_before, target.rank_after))
        groups[key].append(target)
    rows: list[tuple[str, ...]] = [("rewriting", "kind", "rank", "targets", "difference")]
    rows += [(*key, str(len(found)), _worst(found)) for key, found in sorted(groups.items())]
    return rows


def _each(targets: Sequence[Converted]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("target", "rewriting", "kind", "rank", "difference")]
    rows += [
        (
            target.target,
            _ways(target),
            _arrow(target.before, target.after),
            _arrow(target.rank_before, target.rank_after),
            _worst([target]),
        )
        for target in targets
    ]
    return rows


def _ways(target: Converted) -> str:
    return ", ".join(target.rules) or "rename"


def _arrow(before: str | int | None, after: str | int | None) -> str:
    one, other = ("-" if each is None else str(each) for each in (before, after))
    return one if one == other else f"{one} -> {other}"


def _worst(targets: Sequence[Converted]) -> str:
    found = [each.difference for each in targets if each.difference is not None]
    if len(found) < len(targets):
        return "not compared"
    return f"{max(found):.1e}" if any(found) else "0"
