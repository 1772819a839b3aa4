"""Dotted paths held against patterns: the ends of paths, ``*`` for a number."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ends_with", "matched"]


def ends_with(path: str, ends: Iterable[str]) -> bool:
    """Whether a path ends as one of these says."""
    return any(f".{path}".endswith(f".{end}") for end in ends)


def matched(pattern: str, path: str) -> tuple[str, ...] | None:
    """What the numbers of a pattern are in the beginning of a path, or None where that is another."""
    wanted, parts = pattern.split("."), path.split(".")
    if len(parts) < len(wanted):
        return None
    pairs = list(zip(wanted, parts, strict=False))
    if any(part != each if each != "*" else not part.isdigit() for each, part in pairs):
        return None
    return tuple(part for each, part in pairs if each == "*")
