"""``lorahub diff``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from lorahub import comparing
from lorahub.cli.options import allow_option, base_option, hub_option, output_options
from lorahub.cli.output import Output, aligned
from lorahub.composition.comparing import Comparison, Row

__all__ = ["diff"]

SHOWN = 40
"""Targets listed for people."""


@click.command()
@click.argument("a")
@click.argument("b")
@base_option
@click.option(
    "--tolerance",
    type=float,
    default=1e-6,
    show_default=True,
    help="Changes that differ by at most this share of the larger one count as the same.",
)
@allow_option
@hub_option
@output_options
def diff(
    a: str, b: str, base: str | None, tolerance: float, allow: tuple[str, ...], hub: str | None, out: Output
) -> int:
    """Compare two adapters: norms, relative difference, cosine and principal angles of what they change.

    Nothing of a weight's size is made: changes of low rank are compared by their factors. With --base, adapters whose
    formats name modules differently are compared too, and kinds that look at the weights. Exit codes: 0 every target
    is equal within the tolerance, 1 they differ, or something could not be compared; 2 and more as everywhere.
    """
    with out.progress("fetching") as progress:
        found = comparing.diff(a, b, base=base, tolerance=tolerance, allow=allow, hub=hub, progress=progress)
    out.answer(
        {"a": a, "b": b, **found.document()}, text=_text(a, b, found), bare="equal" if found.equal else "different"
    )
    return 0 if found.equal else 1


def _text(a: str, b: str, found: Comparison) -> str:
    whole, document = found.whole, found.document()
    counts = document["targets"]
    assert isinstance(counts, dict)
    facts = [
        ("A", a),
        ("B", b),
        ("targets", ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"),
        ("norms", f"{whole.norms[0]:.4g}, {whole.norms[1]:.4g}"),
        ("relative difference", f"{whole.relative:.3g}"),
        ("cosine", _number(whole.cosine)),
    ]
    if any(row.relation and row.relation.angles_out for row in found.rows if row.state != "equal"):
        facts.append(("angles", "smallest / mean, in degrees, of the spaces written to (out) and read from (in)"))
    said = "equal" if found.equal else "different"
    rows = sorted((row for row in found.rows if row.state != "equal"), key=lambda row: -_size(row))
    shown = [row for row in found.rows if row in rows[:SHOWN]]
    table = f"\n\n{aligned(_table(shown))}" if shown else ""
    if len(rows) > SHOWN:
        table += f"\n  and {len(rows) - SHOWN} more, which differ less: --json has all"
    return f"{said}\n{aligned(facts)}{table}"


def _size(row: Row) -> float:
    """How far apart the two are; what was not compared comes first."""
    return math.inf if row.relation is None else row.relation.relative


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    head = ("target", "state", "norm A", "norm B", "difference", "cosine", "angles out", "angles in", "why")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        found = row.relation
        kinds = "" if row.kinds[0] == row.kinds[1] or not all(row.kinds) else f"{row.kinds[0]}, {row.kinds[1]}"
        if found is None:
            lines.append((row.target, row.state, "", "", "", "", "", "", row.reason))
            continue
        both = row.state in ("close", "different")
        lines.append(
            (
                row.target,
                row.state,
                f"{found.norms[0]:.3g}" if row.kinds[0] else "",
                f"{found.norms[1]:.3g}" if row.kinds[1] else "",
                f"{found.relative:.3g}" if both else "",
                _number(found.cosine) if both else "",
                _angles(found.angles_out),
                _angles(found.angles_in),
                row.reason or kinds,
            )
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _angles(angles: Sequence[float]) -> str:
    """The smallest and the mean, in degrees."""
    if not angles:
        return ""
    degrees = [math.degrees(angle) for angle in angles]
    return f"{min(degrees):.1f} / {sum(degrees) / len(degrees):.1f}"
