"""``lorahub inspect``."""

from __future__ import annotations

import click

from lorahub import sources
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned, size
from lorahub.inspection import Inspection

__all__ = ["inspect"]


@click.command()
@click.argument("ref")
@hub_option
@output_options
def inspect(ref: str, hub: str | None, out: Output) -> None:
    """Say what an adapter is: format, kinds, ranks, scales, targets, base, record.

    REF is a folder, a safetensors file, or NS/NAME[@VERSION]. Only headers are read.
    """
    with out.progress("pulling") as progress:
        found = sources.inspect(ref, hub=hub, progress=progress)
    out.answer(found.document(), text=_text(found), bare=found.format)
    out.findings(found.findings)


def _text(found: Inspection) -> str:
    kinds = ", ".join(sorted({row.kind for row in found.rows})) or "nothing that changes weights"
    facts = [
        ("format", f"{found.format} ({found.file})"),
        ("kinds", kinds),
        ("size", f"{found.parameters:,} parameters, {size(found.nbytes)}"),
        ("base", found.base or "not recorded"),
    ]
    if found.parts:
        facts.append(("parts", ", ".join(found.parts)))
    known = found.record or {}
    facts += [(key, str(known[key])) for key in ("name", "version", "license") if known.get(key)]
    table = [("kind", "target", "modules", "rank", "scale", "dtype")]
    table += [
        (
            row.kind,
            row.targets,
            str(row.modules),
            "" if row.rank is None else str(row.rank),
            "" if row.scale is None else f"{row.scale:g} ({row.scale_rule})" if row.scale_rule else f"{row.scale:g}",
            "+".join(row.dtypes),
        )
        for row in found.rows
    ]
    return f"{found.where}\n{aligned(facts)}\n\n{aligned(table)}" if found.rows else f"{found.where}\n{aligned(facts)}"
