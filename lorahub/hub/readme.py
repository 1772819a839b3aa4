"""The front matter of a README: the YAML between two lines of dashes at its start.  Never believed, never executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorahub import strict_yaml
from lorahub.strict_json import NotStrict

__all__ = ["front_matter"]

_LIMIT = 256 << 10


def front_matter(text: str) -> Mapping[str, Any]:
    """What a README's front matter says, or nothing where there is none or it is not plain YAML."""
    first, _, rest = text.removeprefix("\ufeff").replace("\r\n", "\n").partition("\n")
    body, dashes, _ = f"\n{rest}".partition("\n---")
    if first.rstrip() != "---" or not dashes:
        return {}
    try:
        found = strict_yaml.read(body, limit=_LIMIT)
    except NotStrict:
        return {}
    return found if isinstance(found, dict) else {}
