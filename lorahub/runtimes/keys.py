"""Looks at an adapter's keys, for tables of runtimes that go by how files spell things.  Knows no runtime."""

from __future__ import annotations

import re
from collections.abc import Collection

from lorahub.deltas.kind import JSON
from lorahub.runtimes.runtime import Case, Look, Subject

__all__ = ["HEADER", "all_of", "keys", "keys_of", "other_alpha", "unread_format"]

HEADER = "lora_adapter_metadata"
"""Where diffusers' files state alphas beside the tensors."""


def keys_of(subject: Subject) -> tuple[str, ...]:
    """The names of the tensors in the weights file."""
    return tuple(subject.files.headers[subject.reading.file].tensors)


def keys(pattern: str, value: str = "") -> Look:
    """A look for keys in which ``pattern`` is found; ``value`` stands for what they are."""
    searched = re.compile(pattern)

    def look(subject: Subject) -> Case | None:
        where = tuple(key for key in keys_of(subject) if searched.search(key))
        return Case(value=value, where=where) if where else None

    return look


def all_of(first: Look, *others: Look) -> Look:
    """A look that applies where all do; it says what the first says."""

    def look(subject: Subject) -> Case | None:
        return first(subject) if all(each(subject) for each in others) else None

    return look


def unread_format(read: Collection[str]) -> Look:
    """A look for adapters in a format that is none of these."""

    def look(subject: Subject) -> Case | None:
        reading = subject.reading
        return None if reading.format in read else Case(value=reading.format, where=(reading.file,))

    return look


def other_alpha(subject: Subject) -> Case | None:
    """Modules whose alpha is not their rank, and stands in no tensor of theirs."""
    where = []
    for group in subject.reading.groups:
        alpha: JSON = group.options.get("alpha")
        down = group.slots.get("down")
        stated = down is not None and "alpha" not in group.slots and isinstance(alpha, int | float)
        if stated and down is not None and alpha != down.shape[0]:
            where.append(group.module)
    return Case(where=tuple(where)) if where else None
