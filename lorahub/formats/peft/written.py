"""What lorahub writes into the metadata of a PEFT file: what keys and config leave out, where PEFT looks for nothing.

Text in, names out; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorahub import strict_json
from lorahub.deltas.disputes import Compat, as_compat
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, UsageError
from lorahub.files.header import Header

__all__ = ["COMPAT", "METADATA", "written_choice", "written_down"]

METADATA = "lorahub.parameters"
"""Key of the safetensors header under which lorahub writes down what PEFT's keys leave out."""

_LONGEST = 4 << 20
"""Bytes of that text, which has one line for each adapted parameter."""

COMPAT = "lorahub.compat"
"""Key of the safetensors header under which lorahub writes down whose result a file's factors are for."""


def written_down(header: Header) -> Mapping[str, Mapping[str, JSON]]:
    """Stem -> what lorahub wrote down of it; empty where it did not.

    Raises:
        IntegrityError: the text is none that lorahub writes.
    """
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        value = strict_json.read(text, limit=_LONGEST)
    except (strict_json.NotStrict, ValueError, RecursionError) as error:
        raise IntegrityError(f"{METADATA} in the file's metadata is damaged: {error}") from None
    if not isinstance(value, dict) or not all(_is_entry(each) for each in value.values()):
        raise IntegrityError(f"{METADATA} in the file's metadata does not name parameters: {text[:80]}")
    return value


def written_choice(header: Header) -> Compat | None:
    """Whose result lorahub wrote the file for; None where it did not, or where that makes no difference.

    Raises:
        IntegrityError: it says something else.
    """
    said = header.metadata.get(COMPAT)
    try:
        return as_compat(said)
    except UsageError:
        raise IntegrityError(f"{COMPAT} in the file's metadata is {str(said)[:80]!r}, which is no choice") from None


def _is_entry(value: JSON) -> bool:
    if not isinstance(value, dict):
        return False
    parameter, transposed = value.get("parameter"), value.get("transposed")
    return isinstance(parameter, str) and bool(parameter) and (transposed is None or isinstance(transposed, bool))
