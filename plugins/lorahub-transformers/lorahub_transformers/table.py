"""What is supported, from the tables themselves: ``python -m lorahub_transformers.table``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from lorahub_transformers.families import FAMILIES, Family
from lorahub_transformers.fused import entries_of
from lorahub_transformers.fusions import FUSED, Fused

__all__ = ["Row", "rows", "table"]

_HEAD = (
    "| architectures | known from | presets | heads that travel | inside one parameter, as targets of their own |",
    "|---|---|---|---|---|",
)
_PRESETS = (
    ("attention", "attention"),
    ("feed-forward", "feed_forward"),
    ("all-linear", "linear"),
    ("all-conv", "conv"),
    ("all-embedding", "embedding"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Architectures that are supported alike.

    Attributes:
        kinds: their ``model_type``; none: all others that the installed transformers builds from a configuration.
        source: what tells names, types and ties: the table, which needs neither torch nor transformers, or the classes.
        presets: the presets of which it is said what they mean.
        heads: the classes whose head travels with an adapter.
        fused: (fused module, projections inside it, how its rows lie).
    """

    kinds: tuple[str, ...]
    source: str
    presets: tuple[str, ...]
    heads: tuple[str, ...] = ()
    fused: tuple[tuple[str, tuple[str, ...], str], ...] = ()


def rows() -> list[Row]:
    """A row for each architecture of the tables, and one for all the others."""
    found = [_declared(kind, family) for kind, family in sorted(FAMILIES.items())]
    asked = ("attention", "all-linear", "all-conv", "all-embedding", "experts")
    alike: dict[tuple[tuple[str, tuple[str, ...], str], ...], list[str]] = {}
    for kind in sorted({kind for fused in FUSED for kind in fused.kinds} - FAMILIES.keys()):
        alike.setdefault(_fused(kind), []).append(kind)
    found += [Row(kinds=tuple(kinds), source="classes", presets=asked, fused=fused) for fused, kinds in alike.items()]
    return [*found, Row(kinds=(), source="classes", presets=asked)]


def table() -> str:
    """The rows as Markdown."""
    return "\n".join([*_HEAD, *map(_line, rows())]) + "\n"


def _declared(kind: str, family: Family) -> Row:
    return Row(
        kinds=(kind,),
        source="table",
        presets=tuple(preset for preset, field in _PRESETS if getattr(family, field)),
        heads=tuple(head.name for head in family.heads if head.parameters),
        fused=_fused(kind),
    )


def _fused(kind: str) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    def one(fused: Fused) -> tuple[str, tuple[str, ...], str]:
        return fused.module, fused.parts, fused.how

    return tuple(map(one, entries_of(kind)))


def _line(row: Row) -> str:
    kinds = ", ".join(f"`{kind}`" for kind in row.kinds) or "every other that transformers builds"
    fused = "; ".join(f"`{module}`: {', '.join(parts)} ({how})" for module, parts, how in row.fused)
    cells = (kinds, row.source, ", ".join(row.presets), ", ".join(row.heads) or "-", fused or "-")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(table())
