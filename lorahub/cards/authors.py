"""What of a README is the author's: the text around our part, and the metadata that no card of ours wrote.

Two READMEs with the same are alike to people, whatever version our part speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorahub.cards import block
from lorahub.cards.front import read_front, split

__all__ = ["author_digest", "mark", "marked"]


def author_digest(text: str) -> str:
    """Twelve hex digits that tell one author's part from another; "" where there is none.

    Raises:
        RecordError: the metadata cannot be read, or our part was changed by hand.
    """
    document = split(text)
    where, written = block.take(document.body, document.body_line)
    return mark(read_front(document), block.around(document.body, where), written)


def marked(text: str) -> str:
    """The author's part that a card was made around, as that card remembers it; "" where none does.

    Raises:
        RecordError: as ``author_digest``.
    """
    document = split(text)
    return block.take(document.body, document.body_line)[1].author


def mark(values: Mapping[str, Any], text: str, written: block.Written) -> str:
    """The digest of an author's part in its two halves.

    Args:
        values: all metadata.
        text: the body without our part.
        written: what of the metadata is ours.
    """
    theirs = {key: value for key, value in values.items() if written.keys.get(key) != block.digest(value)}
    for key, ours in written.items.items():
        if isinstance(theirs.get(key), list):
            theirs[key] = [each for each in theirs[key] if each not in ours]
    theirs = {key: value for key, value in theirs.items() if value not in (None, "", [], {})}
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return block.digest([dict(sorted(theirs.items())), lines]) if theirs or lines else ""
