"""How a composed adapter is written: in which format, and in whose words where the base has others than the adapters.

Adapters in another vocabulary than their base are composed under the base's names; what comes of it is written in the
words that the tools of its format read, as a conversion would.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composing.ingredients import Opened
from lorahub.conversion.change import Change, Origin
from lorahub.conversion.home import FORMATS, at_home
from lorahub.conversion.naming import respell_hints
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON

__all__ = ["layout_of", "spelled"]


def layout_of(deltas: Collection[Target], opened: Sequence[Opened]) -> str:
    """The format that adapters share; else PEFT's, or the first one's where there are parts of a pipeline.

    Where names were translated, only one whose words are known; else that of diffusers, or PEFT's for a single model.

    Args:
        deltas: targets of the result.
        opened: the adapters.
    """
    formats = list(dict.fromkeys(each.format for each in opened if each.format))
    in_parts = any(target.component for target in deltas)
    if any(each.moved for each in opened):
        formats = [each for each in formats if each in FORMATS] or ["diffusers" if in_parts else "peft"]
    if len(formats) == 1 or (formats and in_parts):
        return formats[0]
    return "peft"


def spelled(
    deltas: Mapping[Target, Delta],
    hints: Mapping[str, JSON],
    to: str,
    opened: Sequence[Opened],
    index: BaseIndex | None,
) -> tuple[Mapping[Target, Delta], Mapping[str, JSON]]:
    """A result and its hints in the words that are written; as they are where no name was translated.

    diffusers reads no module without the part of a pipeline, which a base that is one model does not have.

    Args:
        deltas: under the base's names.
        hints: see ``Adapter``.
        to: the format.
        opened: the adapters.
        index: the base, or None.

    Raises:
        CannotCarry: they have other words in that format, and these are not known in full, or parts cannot be fused.
    """
    unnamed = to == "diffusers" and index is not None and any(not target.component for target in deltas)
    if not (unnamed or any(each.moved for each in opened)):
        return deltas, hints
    changes = [Change(target=each, delta=delta, origins=(Origin(target=each),)) for each, delta in deltas.items()]
    home = at_home(changes, to, index, lambda _: None)
    renamed = {change.target: change.delta for change in home.changes}
    return renamed, {**respell_hints(hints, home.changes), **home.hints}
