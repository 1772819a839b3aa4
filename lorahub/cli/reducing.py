"""What ``extract`` and ``resize`` have in common: how much to keep, and the table of what was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from lorahub.cli.output import Output, aligned, size
from lorahub.composition.reducing.report import ReduceReport, Row

__all__ = ["budget_options", "show"]

F = TypeVar("F", bound=Callable[..., Any])

SHOWN = 30
"""Targets listed for people; ``--json`` has all."""


def budget_options(command: F) -> F:
    """``--rank``, ``--energy``, ``--error``, ``--adaptive``, ``--parameters``."""
    for option in (
        click.option("--parameters", type=int, help="Spend so many numbers on all factors together."),
        click.option("--adaptive", is_flag=True, help="Meet the energy or error over all targets together."),
        click.option("--error", type=float, help="Lose at most this share of each change's norm, as 0.05."),
        click.option("--energy", type=float, help="Keep at least this share of each change's squared norm, as 0.99."),
        click.option("--rank", type=int, help="At most this rank for every target."),
    ):
        command = option(command)
    return command


def show(report: ReduceReport, out: Output) -> None:
    """The report: facts, then the targets that lost most."""
    counts = report.document()["targets"]
    assert isinstance(counts, dict)
    facts = [
        ("targets", ", ".join(f"{count} {way}" for way, count in counts.items() if count)),
        ("ranks", _ranks(report.ranks)),
        ("energy kept", f"{report.energy:.6f}"),
        ("relative error", f"{report.error:.3g}"),
        ("written", size(report.bytes_written)),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    text = f"{report.out}\n{aligned(facts)}"
    listed = sorted((row for row in report.rows if row.error is not None), key=lambda row: -(row.error or 0.0))
    if listed:
        text += f"\n\n{aligned(_table(listed[:SHOWN]))}"
    if len(listed) > SHOWN:
        text += f"\n  and {len(listed) - SHOWN} more, which lost less: --json has all"
    out.answer(report.document(), text=text, bare=report.out)
    out.findings(report.findings)


def _ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "none"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    head = ("target", "shape", "became", "rank", "energy", "error", "why")
    return [
        head,
        *(
            (
                row.target,
                "x".join(map(str, row.shape)),
                row.way,
                " -> ".join(str(rank) for rank in (row.before, row.rank) if rank is not None),
                "" if row.energy is None else f"{row.energy:.4f}",
                "" if row.error is None else f"{row.error:.3g}",
                row.reason,
            )
            for row in rows
        ),
    ]
