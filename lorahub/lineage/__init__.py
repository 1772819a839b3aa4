"""What base an adapter was probably made for, where nothing records it: from its header's metadata, or from its shapes.

Shapes tell an architecture and no more: a Pony and an Illustrious adapter have the same ones, so such a family is named
only where the metadata names it, and what shapes alone say ends in "-shaped".  Tables; a guess changes nothing.
Widths and depths are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from lorahub.lineage.guesses import Guess
from lorahub.lineage.modules import Module, first_of, modules_of
from lorahub.lineage.shapes import Pick, by_shape
from lorahub.lineage.statements import family_in, stated_in

__all__ = ["Guess", "Module", "guess", "label_of", "modules_of"]


def label_of(metadata: Mapping[str, str], modules: Callable[[], Sequence[Module]]) -> str:
    """The label of what ``guess`` finds, or ""; modules are asked for only where metadata leave the label open."""
    if stated := stated_in(metadata):
        family = family_in(metadata)
        return _label(family[0] if family else "", stated[0])
    found = guess(metadata, modules(), _any)
    return found.label if found else ""


def _label(family: str, architecture: str) -> str:
    return (
        f"{family} ({architecture})" if family and architecture and family != architecture else family or architecture
    )


def guess(metadata: Mapping[str, str], modules: Sequence[Module], pick: Pick | None = None) -> Guess | None:
    """What the base may be, or None where nothing tells; metadata before shapes.

    Args:
        metadata: of the header.
        modules: that change.
        pick: which of several modules is the evidence; the first in natural order by default.
    """
    shaped = by_shape(modules, pick or first_of)
    stated = stated_in(metadata)
    family = family_in(metadata)
    if family is None and stated is None:
        return shaped
    architecture = stated[0] if stated else shaped.architecture if shaped else ""
    key = family[1] if family else stated[1] if stated else ""
    named = family[0] if family else ""
    evidence = f"{key} says {metadata[key]}"
    if stated and shaped and shaped.architecture.split()[0] not in (architecture.split()[0], "UNet", "CLIP-L"):
        evidence += f", though its shapes are {shaped.label} ({shaped.evidence})"
    label = _label(named, architecture)
    return Guess(label=label, architecture=architecture, family=named, source="metadata", evidence=evidence)


def _any(modules: Iterable[Module]) -> Module | None:
    """Any of them, for whoever does not ask which."""
    return next(iter(modules), None)
