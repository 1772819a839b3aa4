"""The table of the README, from the architectures' own: ``python -m lorahub_timm.table``."""

from __future__ import annotations

import sys

from lorahub_timm.families import FAMILIES, Family, Fused

__all__ = ["table"]

_HEAD = ("| architectures | inside one parameter, as targets of their own | how its rows lie |", "|---|---|---|")


def table() -> str:
    """Markdown, a line for each family."""
    return "\n".join([*_HEAD, *map(_line, FAMILIES)]) + "\n"


def _line(family: Family) -> str:
    inside = dict.fromkeys(f"`{fused.module}`: {', '.join(fused.parts)}" for fused in family.fused)
    how = dict.fromkeys(map(_how, family.fused))
    return f"| {family.name} | {'; '.join(inside) or '-'} | {'; '.join(how) or '-'} |"


def _how(fused: Fused) -> str:
    if fused.heads is None:
        return "one projection after the other"
    return "head by head" if fused.even else "head by head, values wider"


if __name__ == "__main__":
    sys.stdout.write(table())
