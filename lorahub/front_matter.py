"""The front matter of a README: where it lies in the text, and what it says.  Never believed, never executed.

What counts as front matter is what the Hub takes for it: YAML between two lines of ``---`` at the start, where white
space may come before the first and behind the second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorahub import strict_yaml
from lorahub.strict_json import NotStrict

__all__ = ["LIMIT", "Cut", "cut", "front_matter"]

LIMIT = 256 << 10
"""Bytes of YAML."""

_BLOCK = re.compile(r"(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z))")
"""The opening line, YAML, the closing line."""

_EMPTY = re.compile(r"(\s*---(\r\n|\r|\n))(---[ \t]*(?:\r\n|\n|\Z))")
_BOM = "\ufeff"


class Cut(NamedTuple):
    """A text with front matter, in its parts: joined in this order they are the text."""

    head: str
    yaml: str
    tail: str
    body: str


def cut(text: str) -> Cut | None:
    """Where the front matter of a README lies; None where it has none."""
    bom, rest = (_BOM, text[1:]) if text.startswith(_BOM) else ("", text)
    if empty := _EMPTY.match(rest):
        return Cut(bom + empty[1], "", empty[3], rest[empty.end() :])
    if block := _BLOCK.match(rest):
        return Cut(bom + block[1], block[2], block[3], rest[block.end() :])
    return None


def front_matter(text: str) -> Mapping[str, Any]:
    """What a README's front matter says, or nothing where there is none or it is not plain YAML."""
    found = cut(text)
    try:
        said = strict_yaml.read(found.yaml, limit=LIMIT) if found is not None else None
    except NotStrict:
        return {}
    return said if isinstance(said, dict) else {}
