"""What searches of every hub have in common."""

from __future__ import annotations

from contextlib import suppress

from lorahub.errors import InvalidRef, UsageError
from lorahub.names import Ref, printable

__all__ = ["base_name"]


def base_name(base: str) -> str:
    """The repository of a base as people write it, without its commit.

    Raises:
        UsageError: it is a local path, or no name.
    """
    with suppress(InvalidRef):
        if (repo := Ref.parse(base, bare=True).repo) is not None:
            return repo
    raise UsageError(f"'{printable(base)}' is no base on a hub", "Name it as there: --base ORG/NAME")
