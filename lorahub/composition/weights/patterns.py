"""Patterns that name targets, and what a pattern that fits none may have meant.  Names only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from lorahub.bases.layout import Target
from lorahub.errors import RecipeError
from lorahub.names import matches, printable

__all__ = ["fits", "no_fit"]


def fits(pattern: str, target: Target) -> bool:
    """Whether a pattern matches a target's parameter, its module, or its name with the component.

    ``*`` stands for any run of characters, dots included, and the pattern is of the whole: ``*.self_attn.*``.
    """
    return any(matches(pattern, name) for name in _spellings(target))


def _spellings(target: Target) -> tuple[str, ...]:
    return target.name, target.name.removeprefix(f"{target.component}:"), target.module


def no_fit(pattern: str, targets: Sequence[Target], fitting: Sequence[Target], where: str) -> RecipeError:
    """The error for a pattern that no target gets its number from, with one that would give some.

    Args:
        pattern: as written.
        targets: that there are.
        fitting: those it fits, which earlier patterns took.
        where: key path.
    """
    said = printable(pattern)
    if fitting:
        return RecipeError(
            f"{where}: all {len(fitting)} targets that '{said}' fits have their number from an earlier filter",
            "put it first: the first filter that fits counts",
        )
    example = f", such as {targets[0].name}" if targets else ""
    for near in _nearby(pattern, targets):
        if count := sum(fits(near, target) for target in targets):
            hint = f"'{printable(near)}' fits {count} of them"
            break
    else:
        hint = "a pattern is of the whole name, and '*' is any run of characters"
    return RecipeError(f"{where}: '{said}' fits none of {len(targets)} targets{example}", hint)


def _nearby(pattern: str, targets: Sequence[Target]) -> Iterator[str]:
    """Patterns like one that fits nothing: anywhere in the name, and with its words as the targets have them."""
    words = sorted({word for target in targets for word in re.split(r"[.:]", target.name)})
    pieces = re.split(r"([.:*])", pattern)
    close = "".join(next(iter(get_close_matches(piece, words, n=1)), piece) for piece in pieces)
    for each in (pattern, close):
        yield each
        yield f"*{each.strip('*')}*"
