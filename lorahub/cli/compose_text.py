"""What ``lorahub compose`` shows: the methods, the plan, and what was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorahub.cli.output import Output, aligned, size
from lorahub.composing.result import ComposeReport
from lorahub.composition.explaining import Line, Outline
from lorahub.composition.method import (
    ElementMethod,
    FactorMethod,
    GramMethod,
    Method,
    ProductMethod,
    SumMethod,
)
from lorahub.engine.report import MergeReport
from lorahub.recipe import Recipe

__all__ = ["show_made", "show_merged", "show_methods", "show_outline"]

SHOWN = 30
"""Targets listed for people; ``--json`` has all."""

SPACES: tuple[tuple[type[Method], str], ...] = (
    (SumMethod, "sum"),
    (GramMethod, "angles"),
    (FactorMethod, "factors"),
    (ElementMethod, "elements"),
    (ProductMethod, "product"),
)
"""What a method works on, in a word."""


def show_methods(methods: Mapping[str, type[Method]], out: Output) -> None:
    """Every method: what it works on, its parameters and their defaults."""
    document = {
        name: {
            "title": method.title,
            "source": method.source,
            "space": _space(method),
            "ordered": method.ordered,
            "draws": method.draws,
            "adapters": list(method.count),
            "parameters": method.defaults(),
        }
        for name, method in methods.items()
    }
    rows = [
        line
        for name, method in methods.items()
        for line in (
            (name, _space(method), f"{method.title} ({method.source.removeprefix('https://')})"),
            ("", "", " ".join(f"{key}={_value(value)}" for key, value in method.defaults().items()) or "no parameters"),
        )
    ]
    head = ("method", "works on", "what it is (source), and its parameters")
    out.answer(document, text=aligned([head, *rows], indent=""), bare="\n".join(methods))


def _space(method: type[Method]) -> str:
    return next((word for kind, word in SPACES if issubclass(method, kind)), "its own")


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_outline(outline: Outline, recipe: Recipe, threads: int, out: Output) -> None:
    """The plan: the whole, then targets that are alike on one line."""
    ranks = [line.rank for line in outline.lines if line.rank is not None]
    facts = [
        ("method", recipe.method),
        ("adapters", ", ".join(outline.adapters)),
        ("targets", str(len(outline.lines))),
        ("ranks", " to ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "as the numbers decide"),
        ("operations", f"{outline.flops:.2g}"),
        ("memory", f"about {size(outline.peak_bytes(threads))} on {threads} threads"),
    ]
    groups = _alike(outline.lines)
    head = ("targets", "shape", "weights", "ranks in", "rank out", "operations")
    rows = [
        (
            lines[0].target if len(lines) == 1 else f"{len(lines)}, as {lines[0].target}",
            "x".join(map(str, line.shape)) if line.shape is not None else "only the base tells",
            " ".join(f"{weight:g}" for weight in line.weights),
            " ".join("-" if rank is None else str(rank) for rank in line.ranks),
            "-" if line.rank is None else str(line.rank),
            f"{sum(each.flops for each in lines):.2g}",
        )
        for lines in groups[:SHOWN]
        for line in lines[:1]
    ]
    more = f"\n  and {len(groups) - SHOWN} more sorts: --json has all" if len(groups) > SHOWN else ""
    text = f"{aligned(facts, indent='')}\n\n{aligned([head, *rows])}{more}"
    out.answer({**outline.document(threads), "recipe": recipe.document()}, text=text, bare=recipe.fingerprint())


def _alike(lines: Sequence[Line]) -> list[list[Line]]:
    """Targets that differ in their names alone, together; in the order of the first of each."""
    groups: dict[object, list[Line]] = {}
    for line in lines:
        groups.setdefault((line.shape, line.ranks, line.weights, line.rank), []).append(line)
    return list(groups.values())


def show_made(report: ComposeReport, out: Output) -> None:
    """What was made: facts, then the targets that lost most."""
    ranks = [row.rank for row in report.rows if row.rank is not None]
    ways = [row.way for row in report.rows]
    facts = [
        ("targets", ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))),
        (
            "ranks",
            ("none" if not ranks else str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"),
        ),
        ("energy kept", f"{report.energy:.6f}"),
        ("relative error", f"{report.error:.3g}"),
        ("written", size(report.bytes_written)),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    text = f"{report.out}\n{aligned(facts)}"
    listed = sorted(
        (row for row in report.rows if (row.error or 0.0) > NOTABLE or row.notes), key=lambda row: -(row.error or 0.0)
    )
    if listed:
        head = ("target", "became", "ranks in", "rank", "energy", "error", "notes")
        rows = [
            (
                row.target,
                row.way,
                " ".join("-" if rank is None else str(rank) for rank in row.ranks),
                "-" if row.rank is None else str(row.rank),
                "" if row.energy is None else f"{row.energy:.4f}",
                "" if row.error is None else f"{row.error:.3g}",
                "; ".join(row.notes),
            )
            for row in listed[:SHOWN]
        ]
        text += f"\n\n{aligned([head, *rows])}"
    if len(listed) > SHOWN:
        text += f"\n  and {len(listed) - SHOWN} more, which lost less: --json has all"
    out.answer(report.document(), text=text, bare=report.out)


NOTABLE = 1e-3
"""Relative error of a target from which it is listed; what float32 rounds off is not."""


def show_merged(report: MergeReport, target: str, out: Output) -> None:
    """What was merged."""
    facts = [
        ("parameters changed", str(report.changed)),
        ("read / written", f"{size(report.bytes_read)} / {size(report.bytes_written)}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    out.findings(report.findings)
    out.answer(report.document(), text=f"{target}\n{aligned(facts)}", bare=target)
